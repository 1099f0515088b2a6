"""Servers that are processes, killed at random while clients talk, alone and behind nginx."""

import shutil
import subprocess

import pytest

import serving_kills
from tests import real

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
SIZES = ("--chunk-size", "12", "--stride", "4", "--capacity", "5", "--readout-tokens", "3")
OPTIONS = (*SIZES, "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(real.save_backbone(tmp_path_factory.mktemp("replicas") / "tiny-model"))


@pytest.mark.slow
def test_a_killed_server_keeps_what_it_acknowledged(model):
    report = serving_kills.kill(model, times=3, options=OPTIONS)
    assert report.kills == 3
    assert len(report.told) >= 6
    assert report.continued == len(report.told)
    assert report.lost == []


@pytest.mark.slow
@pytest.mark.skipif(NGINX is None, reason="needs nginx")
def test_replicas_behind_a_balancer_keep_what_they_acknowledged(model):
    """Three over a store; conversations go from one to another without anybody's doing."""
    report = serving_kills.kill(model, times=4, replicas=3, go_on=3, options=OPTIONS)
    assert report.kills == 4
    assert report.continued == 3
    assert report.lost == []
    assert sum(served > 0 for served in report.served) >= 2


@pytest.mark.skipif(NGINX is None, reason="needs nginx")
def test_nginx_takes_the_configuration(tmp_path):
    text = serving_kills.nginx_conf([1, 2, 3], 8080)
    assert text.count("server 127.0.0.1:") == 3
    (tmp_path / "nginx.conf").write_text(text)
    command = [NGINX, "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
