"""What stands in for the papers' networks on 8x8 digits, in the smoke profile."""

# A MobileNetV2 is made for larger images than 8x8: ResNets of the same widths stand in for it
# there, of more layers where it has the larger expansion ratio.
STUDENTS = {
    f"mobilenetv2-t{expansion}-w{width}": f"resnet{depth}-x{width}"
    for expansion, depth in ((4, 8), (6, 14), (8, 20), (10, 26))
    for width in (0.35, 0.5, 0.75, 1.0)
}

# STC's pairs at half of their widths and fewer layers, or an eighth where they are four times as
# wide: they fit each other where those of the paper do.
PAIRS = {
    "resnet20": "resnet8-x0.5",
    "resnet56": "resnet14-x0.5",
    "resnet110": "resnet20-x0.5",
    "wrn-16-1": "wrn-10-1-x0.5",
    "wrn-16-2": "wrn-10-2-x0.5",
    "wrn-40-1": "wrn-16-1-x0.5",
    "wrn-46-4": "wrn-16-4-x0.125",
    "vgg13": "vgg13-x0.125",
}

# The teacher of the student search with a quarter of its layers, and students of about a third of
# its parameters or multiply-accumulates on 8x8 images, where there are such.
SEARCH = {
    "densenet-bc-100-12": "densenet-bc-28-6",
    "densenet-bc-50-12": "densenet-bc-16-5",
    "densenet-bc-75-9": "densenet-bc-22-4",
    "densenet-bc-100-7": "densenet-bc-28-3",
    "resnet20-x0.96": "resnet8-x0.35",
    "resnet44-x0.96": "resnet14-x0.35",
    "vgg13-x0.16": "vgg13-x0.03",
    "vgg13-x0.63": "vgg13-x0.11",
    "googlenet-x0.2": "googlenet-x0.04",
    "googlenet-x0.24": "googlenet-x0.05",
    "shufflenetv2-x0.32": "shufflenetv2-x0.02",
    "shufflenetv2-x1.48": "shufflenetv2-x0.18",
    "mobilenetv2-x0.25": "mobilenetv2-x0.02",
    "mobilenetv2": "mobilenetv2-x0.15",
}

# KR's pairs at half of their widths, its teachers with so many layers that they come in groups.
KR = {
    "resnet26": "resnet20-x0.5",
    "resnet8": "resnet8-x0.5",
    "resnet8-x0.875": "resnet8-x0.44",
    "resnet32": "resnet26-x0.5",
    "resnet14": "resnet14-x0.5",
    "resnet14-x0.9375": "resnet14-x0.47",
}

SMOKE = {"resnet50": "resnet14", **STUDENTS, **PAIRS, **SEARCH, **KR}
