"""Names of held-out numbers, taken apart and in words."""

from fd_large.runtime.evaluation_names import in_words, split_name


def test_names_fall_into_set_and_metric():
    assert split_name("held_out_best_constant") == ("held_out", "best_constant")
    assert split_name("unseen_crops_cosine") == ("unseen_crops", "cosine")
    assert split_name("test_top1") == ("test", "top1")
    # All twelve of a kind side by side in TensorBoard.
    assert [split_name(f"box_{name}") for name in ("AP", "APs")] == [("box", "AP"), ("box", "APs")]
    assert split_name("mask_AR100") == ("mask", "AR100")
    assert split_name("loss") == ("evaluation", "loss")


def test_numbers_in_words():
    numbers = {"held_out_loss": 0.31, "held_out_cosine": -0.00001, "unseen_crops_loss": 0.29}
    assert in_words(numbers) == "held-out loss 0.3100, cosine 0.0000; unseen crops loss 0.2900"
    assert in_words({"held_out_best_constant": 0.4}) == "held-out best constant 0.4000"
    detections = {"box_AP": 0.5, "box_APs": 0.1, "mask_AP50": 0.6, "mask_AR1": 0.2}
    assert in_words(detections) == "box AP 0.5000; mask AP50 0.6000"
