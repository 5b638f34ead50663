"""Order of the test files, and Hypothesis without deadlines.

launch/test.sh runs each file in a single process, since a test may use results of earlier tests of its file.
"""

import hypothesis
import pytest

LONGEST_FIRST = ["test_readme.py", "test_slurm.py", "test_runs.py", "test_encoder_pipeline.py"]
"""started first, so that all processes end at about the same time"""

# Two processes may share a core, so a deadline would fail correct tests.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
