"""Hub-ready folders: weights, config, image processor, remote code and card."""

from hf_rsheat.hub.export import export, export_folder, load_folder

__all__ = ["export", "export_folder", "load_folder"]
