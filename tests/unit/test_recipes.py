# SPDX-License-Identifier: GPL-2.0-or-later
"""The recipes of docs/ci.md, as far as they can be checked without the machines that they are for."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs/ci.md").read_text("utf-8")
# Give the service a mount namespace that the host does not see into; RestrictSUIDSGID= makes openat2(2) ENOSYS.
HIDE_THE_NODE = ("ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateMounts", "PrivateDevices", "ReadWritePaths", "ReadOnlyPaths",
                 "ProtectKernelTunables", "ProtectKernelModules", "ProtectControlGroups", "TemporaryFileSystem", "RestrictSUIDSGID")


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_unit(tmp_path):
    unit, = snippets("ini")
    assert not [name for name in HIDE_THE_NODE if re.search(rf"^{name}=", unit, re.MULTILINE)]
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    file = tmp_path / "kvmfs.service"
    file.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", unit, flags=re.MULTILINE))
    result = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_runners_configuration():
    settings, = snippets("toml")
    assert tomllib.loads(settings)["runners"]["docker"]["cap_add"] == ["SYS_ADMIN", "SYS_PTRACE"]


@pytest.mark.parametrize(("index", "schema"), [(0, "github-workflows"), (1, "gitlab-ci")])
def test_schemas(tmp_path, index, schema):
    checker = shutil.which("check-jsonschema") or str(Path(sys.executable).with_name("check-jsonschema"))
    if not Path(checker).exists():
        pytest.skip("no check-jsonschema (pip install check-jsonschema)")
    file = tmp_path / "recipe.yml"
    file.write_text(snippets("yaml")[index])
    result = subprocess.run([checker, "--builtin-schema", f"vendor.{schema}", str(file)], capture_output=True, text=True,
                            timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
