"use strict";
// Runs before the page is drawn: the theme, remembered if the browser lets us. Later: a fade where a table, figure or
// formula goes on beyond the edge.
{
  const root = document.documentElement, KEY = "mfa-theme";
  const recall = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
  const remember = (theme) => { try { localStorage.setItem(KEY, theme); } catch { /* blocked: for this visit only */ } };

  const wanted = new URLSearchParams(location.search).get("theme") || recall();
  if (wanted === "dark" || wanted === "light") root.dataset.theme = wanted;

  function turn() {
    const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    remember(root.dataset.theme);
  }

  function show_more(place) {
    const left = place.scrollLeft > 1, right = place.scrollWidth - place.clientWidth - place.scrollLeft > 1;
    place.classList.toggle("more-left", left);
    place.classList.toggle("more-right", right);
    if (left || right) place.tabIndex = 0;  // arrow keys scroll it
    else place.removeAttribute("tabindex");
  }

  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", turn);
    const sizes = new ResizeObserver((entries) => entries.forEach(({target}) => show_more(target.closest(".scroll, .formula"))));
    for (const place of document.querySelectorAll(".scroll, .formula")) {
      place.addEventListener("scroll", () => show_more(place), {passive: true});
      sizes.observe(place);
      sizes.observe(place.firstElementChild);
    }
  });
}
