"""What `make vision` found (docs/vision.md)."""

from tables.results import markdown, read


def vision_machine() -> str:
    """What `make vision` ran on, and how long its stages took; one line."""
    results = read("vision")
    at = results["machine"]
    minutes = sum(stage["seconds"] for stage in results["stages"]) / 60
    return f"One {at['gpu']}, torch {at['torch']}; {minutes:.0f} minutes of training."


def vision_encoder() -> str:
    """What the encoder has learnt, beside chance and an encoder at random."""
    rows = [
        [
            row["pictures"],
            f"{row['classes']}",
            *(
                f"{row[key]:.0%} / {row[f'{key}, random encoder']:.0%} / {row[chance]:.0%}"
                for key, chance in (
                    ("zero-shot top-1", "chance"),
                    ("image to text recall@5", "chance at 5"),
                    ("text to image recall@5", "chance at 5"),
                )
            ),
        ]
        for row in read("vision")["encoder"]
    ]
    return markdown(
        ["pictures", "classes", "zero-shot top-1", "image to text recall@5", "text to image recall@5"], rows
    )


def vision_stages() -> str:
    """Right answers after each stage; bits per byte of held-out text."""
    rows = []
    for stage in read("vision")["stages"]:
        if "bits per byte" in stage:
            answers = [
                f"{row['held out']:.0%} / {row['known']:.0%} / {row['noise']:.0%}" for row in stage.get("answers", [])
            ] or ["-"] * 4
            rows.append([stage["stage"], *answers, f"{stage['bits per byte']:.3f}", f"{stage['seconds']:.0f}"])
    return markdown(["after", "emoji", "digits", "words", "charts", "bits per byte of text", "seconds"], rows)


def vision_answers() -> str:
    """Right answers at the end, on held-out pictures and on noise in their place."""
    rows = [
        [row["pictures"], f"{row['held out']:.0%}", f"{row['known']:.0%}", f"{row['noise']:.0%}"]
        for row in read("vision")["stages"][-1]["answers"]
    ]
    return markdown(["asked about", "held-out pictures", "known pictures, drawn anew", "noise"], rows)


TABLES = (vision_machine, vision_encoder, vision_stages, vision_answers)
