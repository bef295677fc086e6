"""What all configurations are made of: the strict base class, and numbers with limits."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Numbers are strict: `recipe.steps=true` would be one step otherwise. Upper limits are far beyond use: a slip of a few zeros is
# refused at once, and not noticed by a machine that has run out of memory or processes.
Many = Annotated[int, Field(strict=True, gt=0, le=10**6)]  # anchors, proposals, detections, generated pictures: all in memory
Cells = Annotated[int, Field(strict=True, gt=0, le=64)]
Width = Annotated[int, Field(strict=True, gt=0, le=2**15)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
PositiveShare = Annotated[float, Field(strict=True, gt=0, le=1)]
Extent = Annotated[float, Field(strict=True, ge=0.001, le=10**5)]
Scale = Annotated[float, Field(strict=True, ge=0.05, le=8)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, le=1e30)]  # what fp32 holds
NotNegative = Annotated[float, Field(strict=True, ge=0, le=1e30)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)  # a record could not hold them
