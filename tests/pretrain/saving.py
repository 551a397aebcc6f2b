"""A checkpoint in one go."""

from pretrain.checkpoint.save import Saver


def save(engine, config, fingerprint, run_dir, step, carried=None, **facts):
    """Writes a checkpoint, waits for it, and returns its folder."""
    saver = Saver(engine, config, fingerprint, run_dir)
    saver.begin(step, carried, **facts)
    saved = saver.finish()
    saver.close()
    assert not saved.error
    return saved.folder
