from typing import Any

import pytest

from tests.saes.hub_files import get, progress, stocked, storage  # noqa: F401
from tests.saes.importing import bring, bring_by_api  # noqa: F401


@pytest.fixture(autouse=True)
def data_folder(settings: Any, tmp_path_factory: Any) -> Any:
    """A data folder for each test: row numbers begin anew with every test database, files would not."""
    place = tmp_path_factory.mktemp("data")  # not the tmp_path of the test, which may count what is in it
    settings.DATA_DIR = place / "data"
    settings.IMPORT_DIRS = [place / "import"]
    for folder in (settings.DATA_DIR, *settings.IMPORT_DIRS):
        folder.mkdir()
    return settings.DATA_DIR
