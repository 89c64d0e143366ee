"""What several tests share and no fixture needs to hold; fixtures are in the `conftest.py` of the folder that they are for."""
