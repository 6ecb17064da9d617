"""The GPU benchmarks: what is written when a stage is stopped, and what a second call does. No stage measures anything here."""

import json
import os
import signal
import sys
import textwrap
import time

import pytest
import torch
from click.testing import CliRunner

import zoo
from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import decode, kernels, models, operators, pack, prefill, sheet, sleep
from benchmarks.gpu.sheet import Sheet, ours_first, read, table, timed
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.stamp import group, stamp
from benchmarks.measure import console
from zoo.kernels import tuning
from zoo.signals import StoppedError


def row(n):
    return {"ms": float(n)}


def test_a_sheet_skips_what_is_measured_and_retries_last_what_was_running(tmp_path):
    file = tmp_path / "decode.json"
    calls = []

    def case(name):
        return name, lambda: calls.append(name) or row(len(calls))

    Sheet(file, dry=True).fill([case("a")])
    assert read(file)["complete"]
    file.write_text(json.dumps(read(file) | {"complete": False, "running": "b"}))
    Sheet(file, dry=True).fill([case("a"), case("b"), case("c")])
    assert calls == ["a", "c", "b"]
    content = read(file)
    assert [one["case"] for one in content["rows"]] == calls
    assert content["complete"]
    assert content["running"] is None
    assert {"device", "driver", "versions", "dry", "seconds"} <= content.keys()
    assert all({"commit", "date"} <= one.keys() for one in content["rows"])


def test_an_error_is_a_row_and_a_lost_context_ends_the_process(tmp_path):
    file = tmp_path / "decode.json"

    def raises(error):
        raise error

    def lost():
        Sheet(file, dry=True).fill(
            [
                ("no module", lambda: __import__("no_such_module")),
                ("refused", lambda: raises(ValueError("first line\nsecond"))),
                ("lost", lambda: raises(RuntimeError("CUDA error: an illegal memory access was encountered"))),
                ("next", lambda: row(1)),
            ]
        )

    with pytest.raises(SystemExit) as ended:
        lost()
    assert ended.value.code == 75
    notes = {one["case"]: one["note"] for one in read(file)["rows"]}
    assert notes["no module"] == "not installed: no_such_module"
    assert notes["refused"] == "ValueError: first line"
    assert "illegal memory access" in notes["lost"]
    assert not read(file)["complete"]
    lost()  # in the new process
    assert [one["case"] for one in read(file)["rows"]] == ["no module", "refused", "lost", "next"]


def test_a_failed_capture_ends_the_process(tmp_path):
    def fails():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with pytest.raises(SystemExit) as ended:
        Sheet(tmp_path / "decode.json", dry=True).fill([("a", fails), ("b", lambda: row(1))])
    assert ended.value.code == 75
    assert "capturing" in read(tmp_path / "decode.json")["rows"][0]["note"]


def test_an_error_that_the_gpu_reports_late_ends_the_process(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: unknown")

    monkeypatch.setattr(sheet, "synchronize", broken)
    with pytest.raises(SystemExit) as ended:
        Sheet(tmp_path / "decode.json", dry=True).fill([("a", lambda: row(1)), ("b", lambda: row(2))])
    assert ended.value.code == 75
    assert [one["note"] for one in read(tmp_path / "decode.json")["rows"]] == ["RuntimeError: CUDA error: unknown"]


def test_a_late_error_belongs_to_its_contender(monkeypatch):
    pending = []

    def synchronize():
        if pending:
            raise RuntimeError(pending.pop())

    monkeypatch.setattr(sheet, "synchronize", synchronize)
    result = timed({"ours": lambda: None, "fla": lambda: pending.append("CUDA error: invalid argument")})
    assert isinstance(result["ours ms"], float)
    assert result["fla ms"] == "RuntimeError: CUDA error: invalid argument"


def test_a_stopped_row_is_resumed_by_the_next_call(tmp_path):
    file = tmp_path / "figure2a.json"

    def stopped():
        raise StoppedError("saved", signal.SIGTERM)

    with pytest.raises(StoppedError):
        Sheet(file, dry=True).fill([("t = 1", stopped)])
    assert read(file)["running"] == "t = 1"
    assert read(file)["rows"] == []
    Sheet(file, dry=True).fill([("t = 1", lambda: row(1))])
    assert read(file)["rows"][0]["ms"] == 1
    assert read(file)["complete"]


def test_a_peer_is_not_checked_against_another_peer_if_ours_fails():
    def fails():
        raise ValueError("no kernel")

    result = timed({"ours": fails, "fla": lambda: torch.ones(2), "torch": lambda: torch.zeros(2)}, tolerance=0.1)
    assert result["ours ms"] == "ValueError: no kernel"
    assert isinstance(result["fla ms"], float)
    assert isinstance(result["torch ms"], float)
    assert not [name for name in result if name.startswith("error") or "/" in name]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Two stages, `decode` and `prefill`, played by a script that takes no time to start; it hangs where the file `hang` is."""
    script = tmp_path / "stage.py"
    script.write_text(
        textwrap.dedent("""
        import json, os, sys, time
        from pathlib import Path
        name, file, hang = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[2]).parents[1] / "hang"
        content = json.loads(file.read_text()) if file.exists() else {"rows": []}
        for case in ("a", "b"):
            if case in [row["case"] for row in content["rows"]]:
                continue
            if case == "b" and hang.exists():
                child = os.fork()
                hang.with_name("child").write_text(str(child or os.getpid()))
                time.sleep(60)
            content["rows"].append({"case": case, "commit": "c", "date": "d", "process": os.getpid()})
            content |= {"stage": name, "dry": True, "complete": case == "b", "device": "toy", "driver": None, "versions": {}}
            file.with_suffix(".new").write_text(json.dumps(content))
            file.with_suffix(".new").rename(file)
        """)
    )
    popen = driver.subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, str(script), *command[3:]], **options)

    monkeypatch.setattr(driver.subprocess, "Popen", start)
    monkeypatch.setattr(driver, "results", lambda dry: tmp_path / "results")
    monkeypatch.setattr(driver, "WORTH_STARTING", 0)
    return tmp_path


def call(*arguments):
    result = CliRunner().invoke(driver.main, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def gone(process):
    """True once the process has ended, within five seconds."""
    for _ in range(50):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_stage_stopped_half_way_keeps_its_rows_and_a_second_call_skips_what_is_done(toy, monkeypatch):
    monkeypatch.setattr(driver, "STAGES", {name: STAGES[name] for name in ("decode", "prefill")})
    (toy / "hang").touch()
    (toy / "results").mkdir()
    assert driver.run("decode", toy / "results", True, 1.5) == "stopped at its limit of 2 s"
    stopped = read(toy / "results/decode.json")
    assert [one["case"] for one in stopped["rows"]] == ["a"]
    assert gone(int((toy / "child").read_text()))  # what the stage started has ended, too
    (toy / "hang").unlink()
    call("--dry")
    first = read(toy / "results/decode.json"), read(toy / "results/prefill.json")
    assert all(content["complete"] for content in first)
    assert first[0]["rows"][0] == stopped["rows"][0]
    assert "decode: measured already" in call("--dry")
    assert (read(toy / "results/decode.json"), read(toy / "results/prefill.json")) == first


def test_stages_that_never_began_come_before_unfinished_ones(tmp_path):
    for name, complete in (("denominators", True), ("decode", False)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"complete": complete}))
    assert driver.pending(["denominators", "decode", "prefill", "figure2a"], tmp_path) == ["prefill", "decode", "figure2a"]


def test_unfinished_stages_continue_while_time_is_left_and_failed_ones_do_not(toy, monkeypatch):
    started = []

    def run(name, folder, dry, seconds):
        started.append(name)
        if name == "prefill":
            return "failed with status 1"
        (folder / f"{name}.json").write_text(json.dumps({"complete": started.count(name) == 2}))
        return "stopped"

    monkeypatch.setattr(driver, "run", run)
    monkeypatch.setattr(driver, "table", lambda content: "")
    call("decode", "prefill", "--dry")
    assert started == ["decode", "prefill", "decode"]


def test_no_time_no_start(toy, monkeypatch):
    monkeypatch.setattr(driver, "WORTH_STARTING", 15)
    assert "not started" in call("decode", "--dry", "--seconds", "3")
    assert not (toy / "results/decode.json").exists()


def test_the_stages_fit_two_commands():
    limits = [stage.seconds for stage in STAGES.values()]
    assert sum(limits[:6]) <= 470
    assert sum(limits[6:]) <= 180


def test_a_gpu_is_needed_unless_it_is_a_rehearsal(monkeypatch):
    monkeypatch.setattr(driver.torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(driver.main, ["decode"])
    assert result.exit_code == 1
    assert "DRY=1" in result.output
    assert driver.results(dry=True).parts[-3:] == ("build", "gpu", "dry")


def kernel_results(rows, dry):
    return {
        "dry": dry,
        "device": "NVIDIA H100",
        "versions": {"triton": "3.6.0"},
        "rows": [
            {"case": tuning.row_name(rows[0]), "right": True, "error": 0.001},
            {"case": f"time of {tuning.row_name(rows[0])}", "ours ms": 0.5},
            {"case": tuning.row_name(rows[1]), "right": True, "error": 0.002},
            {"case": f"time of {tuning.row_name(rows[1])}", "ours ms": 0.25},
            {"case": tuning.row_name(rows[2]), "right": False, "error": 0.9},
        ],
    }


def test_right_configurations_are_stamped_and_the_fastest_comes_first(tmp_path):
    def of(kernel):
        return [one for one in tuning.table() if (one["kernel"], one["arch"], one["dtype"]) == (kernel, 90, "bfloat16")]

    scans = [one for one in of("gated_delta_rule.forward_scan") if one["shape"] == {"K": 128, "V": 128}]
    rows = [*scans[:2], of("gdn_step.step")[0]]
    assert len(rows) == 3
    rows[2] = rows[2] | {"hardware": {"device": "NVIDIA H100", "triton": "3.6.0", "error": 0.001, "ms": 0.1}}
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps(rows))
    (tmp_path / "kernels.json").write_text(json.dumps(kernel_results(rows, dry=True)))
    assert stamp(tmp_path, file) == 0
    assert json.loads(file.read_text()) == rows
    (tmp_path / "kernels.json").write_text(json.dumps(kernel_results(rows, dry=False)))
    assert stamp(tmp_path, file) == 3
    after = json.loads(file.read_text())
    assert [one["config"] for one in after] == [rows[1]["config"], rows[0]["config"], rows[2]["config"]]
    assert after[0]["hardware"] == {"device": "NVIDIA H100", "triton": "3.6.0", "error": 0.002, "ms": 0.25}
    assert after[2]["hardware"] is None


def test_a_worker_that_dies_costs_one_row(tmp_path, monkeypatch):
    """The worker is played by a script that answers every row but `bad`, at which it kills itself."""
    script = "import json, os, sys\nfor row in json.loads(sys.argv[1]):\n    row['kernel'] == 'bad' and os.kill(os.getpid(), 11)\n"
    script += "    print(json.dumps({'right': True}), flush=True)\n"
    popen = kernels.subprocess.Popen
    monkeypatch.setattr(
        kernels.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", script, command[3]], **options)
    )
    rows = [{"kernel": name, "dtype": "float32", "config": {}} for name in ("first", "bad", "last")]
    answers = kernels.queue.SimpleQueue()
    kernels.check_all(rows, answers, dry=False)
    found = [answers.get() for _ in rows]
    assert [(name.split(",")[0], one["right"]) for name, one in found] == [("first", True), ("bad", False), ("last", True)]
    assert found[1][1]["note"] == f"the process died with status {-signal.SIGSEGV}"


def test_pieces_of_a_package_are_joined_again(tmp_path):
    package, folder = tmp_path / "tensorrt", tmp_path / "build"
    (package / "module").mkdir(parents=True)
    (package / "module/library").write_bytes(os.urandom(5000))
    folder.mkdir()
    pack.cut(package, folder, 2000)
    assert [file.stat().st_size <= 2000 for file in sorted(folder.iterdir())] == [True] * 3
    assert (pack.unpack_tensorrt(folder) / "module/library").read_bytes() == (package / "module/library").read_bytes()
    with pytest.raises(pack.click.ClickException, match="at most 64"):
        pack.check(64 * pack.MIB, [package])


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_package_without_one_of_its_pieces_counts_as_missing(tmp_path, missing):
    package, folder = tmp_path / "tensorrt", tmp_path / "build"
    package.mkdir()
    (package / "library").write_bytes(os.urandom(5000))
    folder.mkdir()
    pack.cut(package, folder, 2000)
    (folder / f"tensorrt.{missing}").unlink()
    assert not pack.unpack_tensorrt(folder).exists()
    assert len(list(folder.iterdir())) == 2


def test_only_the_stage_that_needs_it_unpacks_tensorrt(toy, monkeypatch):
    unpacked = []
    monkeypatch.setattr(driver, "unpack_tensorrt", lambda: unpacked.append(1) or toy)
    (toy / "results").mkdir()
    for name in ("decode", "tensorrt"):
        assert driver.run(name, toy / "results", False, 20) == "done"
        assert len(unpacked) == (name == "tensorrt")


def test_the_hybrid_on_a_gpu_has_no_peer_without_fla(monkeypatch):
    monkeypatch.setattr(models, "DEVICE", torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "fla", None)
    hybrid = zoo.create(models.HYBRID, device="meta")
    with pytest.raises(ModuleNotFoundError, match="fla"):
        models.peer(hybrid)


def test_every_case_of_ours_comes_before_any_peer_and_kda_last(tmp_path):
    for stage in (decode, operators, prefill, sleep):
        names = [name for name, _ in stage.cases(False, tmp_path)]
        beside = [name.endswith(", beside peers") for name in names]
        assert beside == sorted(beside)
        assert len(set(names)) == len(names)
        assert any(beside)
    assert names[0] == "hybrid, 1 x 256"
    assert [name for name, _ in operators.cases(False, tmp_path)][-1].startswith("kda")
    found = ours_first([("a", lambda *, peers: {"peers": peers})], [("b", lambda: {})])
    assert [(name, work()) for name, work in found] == [("a", {"peers": False}), ("b", {}), ("a, beside peers", {"peers": True})]


def test_configurations_that_compete_are_checked_and_timed_first(monkeypatch):
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    table = [one for one in kernels.wanted(False) if one["config"]]
    sizes = [sum(group(one) == group(other) for other in table) for one in table]
    assert sorted(sizes, key=(1).__eq__) == sizes
    assert sizes[0] > 1 == sizes[-1]


def test_a_table_says_that_it_is_a_rehearsal(tmp_path):
    Sheet(tmp_path / "decode.json", dry=True).fill([("a", lambda: row(1))])
    with console.capture() as shown:
        console.print(table(read(tmp_path / "decode.json")))
    assert "no figures of a GPU" in " ".join(shown.get().split())


@pytest.mark.extended
def test_the_whole_rehearsal(tmp_path, monkeypatch):
    """Every stage runs its code at tiny sizes, within ten minutes, and none of its rows failed except where a GPU is needed."""
    monkeypatch.setattr(driver, "results", lambda dry: tmp_path)
    started = time.monotonic()
    call("--dry", "--seconds", "590")
    assert time.monotonic() - started < 600
    contents = {name: read(tmp_path / f"{name}.json") for name in STAGES}
    assert all(content["complete"] for content in contents.values())
    failed = [(name, one) for name, content in contents.items() for one in content["rows"] if "Error" in str(one.get("note"))]
    assert {name for name, _ in failed} <= {"tensorrt"}
    assert all(one["right"] for one in contents["kernels"]["rows"] if "right" in one)
