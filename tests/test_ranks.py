"""Ranks that die, refuse or are asked to stop, under torchrun."""
import signal
import subprocess
import sys
import time

from conftest import ROOT, finish, log, summary

SMALL = ["--meta_steps=300", "--self_steps=20", "--arms=real", "--n_embd=16", "--n_head=2", "--block_size=16",
         "--batch_size=4", "--eval_windows=4", "--eval_interval=100", "--save_interval=10", "--device=cpu"]


def torchrun(*arguments):
    """The process of self_ce.py under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)


def ranks_of(process):
    """The process ids of the ranks that a torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def wait_for(path, text):
    while not (path.exists() and text in path.read_text()):
        time.sleep(0.01)


def test_a_rank_that_is_killed_is_started_again_and_the_numbers_are_those_of_a_run_without(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    two = ["--standalone", "--nproc_per_node=2", "--max-restarts=2", "self_ce.py", *SMALL, "--resume=auto"]
    process = torchrun(*two, f"--out_dir={broken}")
    wait_for(broken / "log.jsonl", '"step": 100,')
    ranks = ranks_of(process)
    assert len(ranks) == 2
    subprocess.run(["kill", "-KILL", str(ranks[1])])
    printed = process.communicate(timeout=90)[0]
    assert process.returncode == 0, printed
    finish("self_ce.py", *SMALL, f"--out_dir={whole}", ranks=2)
    assert log(broken) == log(whole) and summary(broken)["arms"] == summary(whole)["arms"]


def test_ranks_that_are_asked_to_stop_do_so_within_seconds_and_not_at_the_next_evaluation(tmp_path):
    out = tmp_path / "run"
    long = ["--meta_steps=100000", "--eval_interval=50000", "--save_interval=50000"]
    process = torchrun("--standalone", "--nproc_per_node=2", "self_ce.py", *SMALL, *long, f"--out_dir={out}")
    wait_for(out / "log.jsonl", '"step": 0,')
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    printed = process.communicate(timeout=60)[0]
    assert time.monotonic() - asked < 20 and "stopped by SIGTERM; go on with: torchrun" in printed, printed
    assert (out / "ckpt.pt").is_file()


def test_each_node_says_why_it_does_not_start_when_one_refuses(tmp_path):
    node = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", "--master_port=29577"]
    run = ["self_ce.py", *SMALL, f"--out_dir={tmp_path / 'run'}"]
    nodes = [torchrun(*node, "--node_rank=0", *run),
             torchrun(*node, "--node_rank=1", *run, f"--dataset={tmp_path / 'nothing.txt'}")]
    first, second = (process.communicate(timeout=60)[0] for process in nodes)
    assert "error: another rank refused or died; what its node printed says why" in first
    assert "nothing.txt': no text file or folder of that name" in second
    assert all(process.returncode for process in nodes) and not list(tmp_path.iterdir())
