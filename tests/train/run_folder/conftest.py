"""What the tests of checkpoints share: a model and its optimizer after three steps."""

import pytest

from tests.helpers.checkpoints import make, train


@pytest.fixture
def trained():
    model, optimizer = make()
    train(model, optimizer, range(3))
    return model, optimizer
