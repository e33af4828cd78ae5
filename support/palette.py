"""One name, colour and marker per attention, the same in every notebook, plot and page.

The colours are Okabe and Ito's, which colour-blind eyes tell apart.
"""

NAME = dict(
    fpba="FPBA", mha="MHA", gqa="GQA", mqa="MQA", mla="MLA", mfa="MFA", mfa_kr="MFA-KR",
)  # fmt: skip
COLOR = dict(
    fpba="#000000", mha="#0072B2", gqa="#56B4E9", mqa="#E69F00", mla="#CC79A7", mfa="#D55E00",
    mfa_kr="#009E73",
)  # fmt: skip
MARKER = dict(fpba="P", mha="o", gqa="v", mqa="s", mla="D", mfa="^", mfa_kr="X")
