from typing import Any

import pytest


@pytest.fixture(autouse=True)
def data_folder(settings: Any, tmp_path: Any) -> Any:
    """A data folder for each test: row numbers begin anew with every test database, files would not."""
    settings.DATA_DIR = tmp_path / "data"
    settings.IMPORT_DIRS = [tmp_path / "import"]
    for folder in (settings.DATA_DIR, *settings.IMPORT_DIRS):
        folder.mkdir()
    return settings.DATA_DIR
