"""Small networks that replace the papers' networks in the smoke profile, for digits of 8x8."""

# A MobileNetV2 is made for images larger than 8x8. A ResNet of the same width replaces it. The
# ResNet has more layers if the MobileNetV2 has a larger expansion ratio.
STUDENTS = {
    f"mobilenetv2-t{expansion}-w{width}": f"resnet{depth}-x{width}"
    for expansion, depth in ((4, 8), (6, 14), (8, 20), (10, 26))
    for width in (0.35, 0.5, 0.75, 1.0)
}

# STC's networks with fewer layers and half of the width, or an eighth of the width if they are
# four times as wide. Two small networks have equal shapes if the paper's two networks have them.
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

# The search's teacher with a quarter of its layers. Each student has about a third of the teacher's
# parameters or multiply-accumulates on images of 8x8, where such a network exists.
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

# KR's networks at half of their width. A teacher has enough layers to form groups of layers.
KR = {
    "resnet26": "resnet20-x0.5",
    "resnet8": "resnet8-x0.5",
    "resnet8-x0.875": "resnet8-x0.44",
    "resnet32": "resnet26-x0.5",
    "resnet14": "resnet14-x0.5",
    "resnet14-x0.9375": "resnet14-x0.47",
}

SMALL_NETWORKS = {"resnet50": "resnet8", **STUDENTS, **PAIRS, **SEARCH, **KR}

# --- images of 16x16 ------------------------------------------------------------------------------

# In so short a training a deeper network is no better than one of 8 layers; a wider one is. So each
# teacher is deeper and wider than its student.
LAPTOP_NETWORKS = {
    **SMALL_NETWORKS,
    "resnet50": "resnet14",
    # The students of RCO that run: more channels for a larger expansion or a larger width.
    "mobilenetv2-t6-w0.35": "resnet8-x0.4",
    "mobilenetv2-t4-w0.5": "resnet8-x0.45",
    "mobilenetv2-t6-w0.5": "resnet8-x0.5",
    "resnet56": "resnet14",
    "resnet110": "resnet20",
    "wrn-40-1": "wrn-16-1",
    "wrn-46-4": "wrn-16-4-x0.5",
    "resnet26": "resnet14",
    "resnet32": "resnet20",
    "resnet14": "resnet8-x0.5",
    "resnet14-x0.9375": "resnet8-x0.44",
}
