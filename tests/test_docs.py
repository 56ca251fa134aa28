"""The code in the documentation runs as it is printed."""

import re
import sys

from kdlib.files import ROOT


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_a_new_method_takes_one_function_and_one_object(tmp_path, monkeypatch, capsys):
    method, use = python_blocks("docs/adding-a-method.md")
    assert len(method.splitlines()) < 40
    (tmp_path / "relay.py").write_text(method)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "relay", raising=False)
    exec(use, {})
    kd, relay = capsys.readouterr().out.splitlines()
    assert " KD " in kd
    assert " Relay " in relay
    assert "relay.Relay" in str(sys.modules["relay"].Relay)
