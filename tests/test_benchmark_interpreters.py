"""Which interpreter serves a peer, and what is said of those that none has."""

import dataclasses
import sys

import pytest

import pgjax as pg
from benchmarks import interpreters
from benchmarks.interpreters import Need, Peer
from tests.tiny import ARCHITECTURES

ARCH = ARCHITECTURES["llama"]
TRL = Peer("TRL PPO", "nothing", (Need("trl", below="1.13"), Need("torch")))


@pytest.fixture
def python(tmp_path):
    """Make an interpreter that says of itself what a test wants."""

    def write(name, says):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{says}'\n")
        path.chmod(0o755)
        return str(path)

    return write


def test_interpreters_are_asked_in_order_and_the_first_with_the_wanted_versions_serves(python):
    new = python("new", '{"python": "3.12.1", "trl": "1.16.0", "torch": "2.13.0"}')
    bare = python("bare", '{"python": "3.11.1", "trl": "1.12.0"}')
    old = python("old", '{"python": "3.11.2", "trl": "1.12.1", "torch": "2.8.0+cpu"}')
    older = python("older", '{"python": "3.11.3", "trl": "0.29.0", "torch": "2.8.0"}')
    assert interpreters.choose([TRL], [new, bare, old, older], ARCH, wanted=True) == ({"TRL PPO": old}, None)
    assert interpreters.choose([TRL], [older, old], ARCH, wanted=True)[0] == {"TRL PPO": older}


def test_a_peer_that_no_interpreter_has_is_named_with_what_each_has_instead(python):
    new = python("new", '{"python": "3.12.1", "trl": "1.16.0", "torch": "2.13.0"}')
    bare = python("bare", '{"python": "3.11.1"}')
    found, absent = interpreters.choose([TRL], [new, bare], ARCH, wanted=True)
    assert found == {} and absent == (
        "TRL PPO missing: needs trl < 1.13, torch; Python 3.12.1 has trl 1.16.0, torch 2.13.0; "
        "Python 3.11.1 has trl not installed, torch not installed (--peer-pythons names others)"
    )
    assert str(new) not in absent  # a report says nothing of where this machine keeps its files
    assert interpreters.choose([TRL], [new], ARCH, wanted=False) == ({}, "peers left out: --no-peer")


def test_what_is_no_python_has_no_packages_and_the_next_one_is_asked(python):
    old = python("old", '{"python": "3.11.2", "trl": "1.12.1", "torch": "2.8.0"}')
    for text in ("", "usage: true", '["3.11"]'):
        other = python(f"other{len(text)}", text)
        assert interpreters.choose([TRL], [other, old], ARCH, wanted=True) == ({"TRL PPO": old}, None)
        found, absent = interpreters.choose([TRL, Peer("any", "", ())], [other], ARCH, wanted=True)
        assert found == {} and f"other{len(text)}, asked for its packages, printed {text + chr(10)!r}" in absent
        assert absent.startswith("TRL PPO missing: ") and "\nany missing: " in absent


def test_without_a_list_this_interpreter_is_asked():
    import numpy

    assert interpreters.installed(sys.executable, ("numpy", "no-such-package"))["numpy"] == numpy.__version__
    assert interpreters.choose([Peer("numpy", "", (Need("numpy"),))], (), ARCH, wanted=True)[0] == {
        "numpy": sys.executable
    }


def test_an_interpreter_that_does_not_run_is_the_users_to_mend(tmp_path):
    with pytest.raises(ValueError, match="nowhere/python does not run"):
        interpreters.installed(str(tmp_path / "nowhere" / "python"), ("trl",))


@pytest.mark.parametrize(
    ("version", "met"), [("1.12.9", True), ("1.13.0", False), ("1.9.0", True), ("2.0", False), ("0.9rc1", True)]
)
def test_versions_are_compared_as_numbers(version, met):
    assert Need("trl", below="1.13").met_by({"trl": version}) is met
    assert Need("trl", at_least="1.13").met_by({"trl": version}) is not met


def test_a_model_that_tunix_does_not_have_is_left_out_and_said_so(python):
    peer = Peer("Tunix", "benchmarks.peers.tunix", (), interpreters.beyond_tunix)
    serves = python("serves", '{"python": "3.11.0"}')
    assert interpreters.choose([peer], [serves], ARCH, wanted=True) == ({"Tunix": serves}, None)
    scaled = pg.Rope(theta=1e6, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)
    for change, why in (
        ({"family": "qwen3"}, "family qwen3"),
        ({"rope": scaled}, "rope"),
        ({"mlp_bias": True}, "biases"),
    ):
        found, absent = interpreters.choose([peer], [serves], dataclasses.replace(ARCH, **change), wanted=True)
        assert found == {} and absent.startswith("Tunix left out: ") and why in absent
