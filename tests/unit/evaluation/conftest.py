from command_fixtures import labelled_images, never_long, own_process, wide

__all__ = ["labelled_images", "never_long", "own_process", "wide"]
