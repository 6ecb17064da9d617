from zoo.export.bundle import export as export
from zoo.export.runtime import load as load
