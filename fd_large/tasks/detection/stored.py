"""Scores a stored run's detector on a dataset, or draws its detections on the user's images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fd_large.checkpoint.read import Reader
from fd_large.files import out_folder
from fd_large.ranks import activity, distributed, meeting
from fd_large.tasks.dense.geometry import resized_view, sizes_of
from fd_large.tasks.dense.stored import Seen, predict_files, task_to_test
from fd_large.tasks.detection.job import DetectionJob, model_of
from fd_large.tasks.detection.scores.annotated_images import draw_image, marks_of
from fd_large.tasks.detection.scores.collect import to_results
from fd_large.tasks.detection.scores.evaluation import evaluate
from fd_large.tasks.detection.scores.tables import classes_table, numbers_table
from fd_large.tasks.stored_run import Predicted, StoredRun, StoredScores
from fd_large.weights.libraries import To
from fd_large.weights.model_card import Learned
from fd_large.weights.origin import without_folders


class StoredDetection(StoredRun):
    """A stored run of detection, which commands can score, and use to detect objects in images."""

    job: DetectionJob

    def learned(self, manifest: Mapping[str, Any], to: To) -> Learned:
        """Returns the model card's title, introduction and tag for the backbone of a detector.

        Args:
            manifest: The manifest of the exported checkpoint.
            to: The library or format of the export, a value of the flag `--to`.
        """
        name = without_folders(self.run.data.root)
        return replace(
            super().learned(manifest, to),
            title=f"trained to detect objects of {name}",
            intro="An image backbone that was trained as a part of a detector; pyramid and heads "
            "are left out. The detector had neither its final norm, which only normalises here, "
            "nor class tokens, which are zeros here.",
            tag="object-detection-backbone",
        )

    def score(self, reader: Reader, folder: Path) -> StoredScores:
        """Scores the detector on the run's test images by COCO's metrics.

        All ranks must call this method. The test images are those of `DetectionJob.test_images`.

        Args:
            reader: A checkpoint of the run.
            folder: Folder of results.json, scores.json and plots, which is made if it is missing.

        Returns: the tables of the metrics and the paths of the written files. On ranks other than 0
            the result has neither tables nor files.
        """
        run, micro = self.run, self.run.batch.micro_batch_size
        classes = _classes(reader)
        images = meeting.meet(lambda: self.job.test_images(classes))
        see = distributed.together(lambda: self.task(reader)).see
        model = model_of(run, see)
        out_folder(folder)
        scoring = evaluate(
            model,
            images,
            folder,
            batch_size=1 if micro == "auto" else micro,
            workers=run.data.workers,
            max_pixels=run.data.max_pixels,
            draw=True,
        )
        try:
            with activity.work("scoring the detections"):
                scored = scoring.scored()
        except BaseException:
            scoring.give_up()
            raise
        scoring.forget()
        if scored is None:
            return StoredScores((), ())
        numbers = numbers_table(scored.scores, tested=model.in_words())
        return StoredScores((numbers, classes_table(scored.scores)), scored.written)

    def predict(
        self, reader: Reader, images: Sequence[str], folder: Path, *, least_score: float
    ) -> Iterator[Predicted]:
        """Draws boxes and masks of detected objects on images, and writes predictions.json.

        A result is yielded for each image.

        Args:
            reader: A checkpoint of the run.
            images: Paths of image files.
            folder: Folder of the results, which is made if it is missing.
            least_score: Smallest score of an object that is drawn and written.
        """
        model, device = model_of(self.run, self.task(reader).see), distributed.device()
        class_names = _classes(reader)

        def see(image: Tensor, stem: str) -> Seen:
            resized = [
                resized_view(*image.shape[-2:], short_side=short, long_side=long).image(image)
                for short, long in model.views.sides
            ]
            (detections,) = model.detect(
                [pixels[None].to(device) for pixels in resized],
                [sizes_of([pixels]).to(device) for pixels in resized],
                sizes_of([image]).to(device),
            )
            results = to_results(
                detections,
                image_id=0,
                original_size=image.shape[-2:],
                category_ids=range(len(class_names)),
            )
            objects = [
                {
                    "class": class_names[result["category_id"]],
                    **{key: result[key] for key in ("score", "bbox", "segmentation")},
                }
                for result in results
                if result["score"] >= least_score
            ]
            drawn = folder / f"{stem}.png"
            draw_image(image.permute(1, 2, 0).numpy(), marks_of(objects), drawn)
            return objects, f"{len(objects)} objects", drawn

        return predict_files(see, images, folder, max_pixels=self.run.data.max_pixels)

    def task(self, reader: Reader) -> Any:
        """Builds the `Detection` task of the checkpoint `reader`, in evaluation mode.

        The task is unsharded and on this rank's device.
        """
        return task_to_test(self.job.make_task, reader, precision=self.run.engine.precision)


def _classes(reader: Reader) -> tuple[str, ...]:
    """Returns the names of the classes in the checkpoint `reader`, in the order of the labels."""
    return tuple(reader.manifest["categories"].values())
