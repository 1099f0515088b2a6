"""What stands in docker/: files that parse, and options that the server has."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from cometlm.cli.main import app

DOCKER = Path(__file__).parents[2] / "docker"


def options_of_serve():
    command = typer.main.get_command(app).commands["serve"]
    return {name for one in command.params for name in one.opts}


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "cometlm.service"])
def test_options_are_the_server_s(name):
    text = (DOCKER / name).read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    given = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines)))
    # of pip, docker and useradd
    others = {"--index-url", "--interval", "--timeout", "--start-period", "--uid", "--create-home"}
    assert given - others <= options_of_serve()
    assert "--store" in given


def test_the_composition_holds_together():
    made = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = made["services"]
    assert services["cometlm-1"] == services["cometlm-2"]
    upstreams = re.findall(r"server (\S+):8000", (DOCKER / "nginx.conf").read_text())
    assert sorted(upstreams) == sorted(name for name in services if name.startswith("cometlm-"))
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert source in made["volumes"] or (DOCKER / source).exists()
    build = services["cometlm-1"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).exists()
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert set(build["args"]) == set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))


def test_uploads_wait_on_a_disk():
    """They may be gigabytes, so not in memory, and where the server may write."""
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["cometlm-1"]
    folder = service["environment"]["TMPDIR"]
    assert folder in {volume.split(":")[1] for volume in service["volumes"]}
    assert folder not in service["tmpfs"]
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert re.search(rf"install -d -o cometlm -g cometlm .*{folder}\b", dockerfile)
    assert folder in re.search(r"^VOLUME (.+)$", dockerfile, re.MULTILINE)[1]
    unit = (DOCKER / "cometlm.service").read_text().splitlines()
    assert "Environment=TMPDIR=/var/tmp" in unit
    assert "PrivateTmp=yes" in unit  # also of /var/tmp, which the unit may not write to else


def test_open_webui_says_which_chat_it_is():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert services["webui"]["environment"]["ENABLE_FORWARD_USER_INFO_HEADERS"] == "true"


def test_what_the_image_copies_is_there():
    sources = re.findall(r"^COPY (.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert sources
    assert all((DOCKER.parent / name).exists() for line in sources for name in line.split())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_takes_the_unit(tmp_path):
    program = tmp_path / "cometlm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = (DOCKER / "cometlm.service").read_text()
    unit = tmp_path / "cometlm.service"
    unit.write_text(text.replace("/opt/cometlm/bin/cometlm", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if str(unit) in line or "cometlm" in line]
    assert (done.returncode, said) == (0, [])
