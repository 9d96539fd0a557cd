"""The architectures: `--model` takes the name of a file here. Each has

    build       a function that returns the network
    LAYERS      prefixes of the parameters' names for each layer, from the input to the head
    RECIPES     by name, such as `scratch`, `short` and `transfer`; the first is the default: see `recipe_for`

and optionally

    IMAGENET    torchvision's name for the ImageNet weights
    PURPOSES    the purposes of recipes other than `scratch`, `short` and `transfer`
    initial_weights_from_images     a function that computes weights from training images
    is_for_small_images             where there are ImageNet weights: a function that tells from the shapes of weights,
                                    by name, whether they were trained on CIFAR's image size instead

An architecture's options are fields of a subclass of `Recipe`; `build` takes them by name. It also takes `large_stem`
where the first layers for ImageNet's 224×224 pixels differ from those for CIFAR's 32×32. Every command imports all
architectures, so they import PyTorch, which takes seconds, only when they build a network.
"""
