from toolkit.budget.fake_step import *  # noqa
from toolkit.budget.fake_step import on_fake_tensors  # noqa
