"""What support/machine.py, train.take and support/files.py promise of machines that this one is not: Windows, a Mac, an old GPU."""

import errno
import os
import sys

import pytest
import torch
from texts import content

from support import cli, files, machine, muon
from support.cli import BadInput, run_command
from support.machine import Machine, can_compile, pick_device, working_device
from train import Train, take


@pytest.fixture
def old_gpu(monkeypatch):
    """A GPU that is there, for which this torch has no kernels."""
    plain = torch.zeros

    def zeros(*args, device=None, **how):
        if device is not None and torch.device(device).type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nSearch for it")
        return plain(*args, device=device, **how)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    working_device.cache_clear()
    yield
    working_device.cache_clear()


def test_a_gpu_that_does_not_work_is_passed_over_and_that_is_said_once(old_gpu, capsys):
    assert pick_device("auto").type == pick_device("auto").type == "cpu"
    assert capsys.readouterr().err == "--device auto: cuda is there, but does not work: CUDA error: no kernel image is available for execution on the device\n"


def test_asked_for_by_name_it_is_refused_and_the_reason_given(old_gpu):
    with pytest.raises(BadInput, match="--device cuda: does not work: CUDA error: no kernel image is available .* device; --device auto takes"):
        pick_device("cuda")


def test_compiling_wants_tritons_c_compiler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(machine.shutil, "which", lambda name: name == "clang")
    assert can_compile(torch.device("cuda"))
    monkeypatch.setattr(machine.shutil, "which", lambda name: name == "mycc")
    assert not can_compile(torch.device("cuda"))
    with pytest.raises(BadInput, match="--compile needs Triton, a C compiler .*: give --no-compile"):
        machine.require_compiler(torch.device("cuda"))
    monkeypatch.setenv("CC", "mycc")
    assert can_compile(torch.device("cuda"))


def test_a_copy_to_a_mac_waits_and_one_to_a_gpu_does_not(monkeypatch):
    plain, seen = torch.Tensor.to, []

    def to(x, device, **how):
        seen.append((device.type, how))
        return plain(x, "cpu")

    monkeypatch.setattr(torch.Tensor, "to", to)
    for kind in ("mps", "cuda"):
        assert take(torch.arange(9), torch.tensor([2]), 3, torch.device(kind)).tolist() == [[2, 3, 4]]
    assert [how["non_blocking"] for kind, how in seen if kind != "cpu"] == [False, True]


def test_muon_computes_in_bfloat16_only_where_a_gpu_has_it(monkeypatch):
    G = torch.randn(8, 4, dtype=torch.float32)

    class OnAGpu:  # as far as orthogonalize asks
        is_cuda, device, dtype, shape, reshape = True, "cuda", G.dtype, G.shape, G.reshape

        def to(self, dtype):
            return G.to(dtype)

    monkeypatch.setattr(muon, "has_bfloat16", lambda _: False)
    old, cpu = muon.orthogonalize(OnAGpu()), muon.orthogonalize(G)
    monkeypatch.setattr(muon, "has_bfloat16", lambda _: True)
    new = muon.orthogonalize(OnAGpu())
    assert torch.equal(old, cpu) and not torch.equal(new, cpu) and torch.allclose(new, cpu, atol=0.05)


def test_on_windows_a_file_that_is_open_elsewhere_for_a_moment_is_replaced(tmp_path, monkeypatch):
    plain, refusals = os.replace, [3]

    def refuse(new, path):
        if refusals[0]:
            refusals[0] -= 1
            raise PermissionError(errno.EACCES, "Access is denied", str(new))
        plain(new, path)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    (tmp_path / "best.pt").write_bytes(b"old")
    with pytest.raises(PermissionError, match="best.pt'"):
        files.write_atomically(tmp_path / "best.pt", lambda file: file.write(b"new"))
    assert content(tmp_path) == {"best.pt": b"old"}
    monkeypatch.setattr(files, "WINDOWS", True)
    refusals[0] = 3
    files.write_atomically(tmp_path / "best.pt", lambda file: file.write(b"new"))
    assert content(tmp_path) == {"best.pt": b"new"}
    refusals[0] = 99
    with pytest.raises(PermissionError, match="best.pt'"):
        files.write_atomically(tmp_path / "best.pt", lambda file: file.write(b"newer"))
    assert content(tmp_path) == {"best.pt": b"new"}


def test_on_windows_a_closed_pipe_ends_training_and_commands_as_elsewhere(monkeypatch):
    class Closed:
        def write(self, _):
            raise OSError(errno.EINVAL, "Invalid argument")

        flush = isatty = fileno = lambda self: 1

    def told(line):
        monkeypatch.setattr(sys, "stdout", Closed())
        return Machine("cpu").print(line)

    with pytest.raises(OSError, match="Invalid argument"):
        told("a line")
    monkeypatch.setattr(cli, "WINDOWS", True)
    told("a line")
    assert sys.stdout.name == os.devnull


def test_a_run_ends_quietly_where_windows_says_that_the_reader_has_gone(monkeypatch):
    def main(args):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        run_command(main, Train, [])
    assert ended.value.code == 2
    monkeypatch.setattr(cli, "WINDOWS", True)
    with pytest.raises(SystemExit) as ended:
        run_command(main, Train, [])
    assert ended.value.code == 141
