"""For all tests: the order of the files, and no limits of time.

launch/test.sh shares the files out among processes, each file to one: its tests may need what those before them made.
"""

import hypothesis
import pytest

LONGEST_FIRST = ["test_readme.py", "test_slurm.py", "test_runs.py", "test_encoder_pipeline.py"]
"""or one process would be busy with them long after the others have ended"""

# Two processes share each core at times: what is correct may then take long.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
