"""What the README says that a machine can check."""

import re

from tests.settings_table import README, with_table


def test_settings_table_is_current():
    text = README.read_text()
    assert with_table(text) == text, "run `python -m tests.settings_table`"


def test_files_it_names_exist():
    text = README.read_text()
    root = README.parent
    for name in re.findall(r"`((?:common|gateway|worker|deploy|tests)/[\w/]+\.\w+)`", text):
        assert (root / name).exists(), name
