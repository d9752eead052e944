"""Page stores in the memory of an accelerator, and the kernels that fill them. Imports without torch."""

from hicache.device.store import DeviceOptions, DeviceStore, open_device

__all__ = ["DeviceOptions", "DeviceStore", "open_device"]
