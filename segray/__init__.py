"""segray: semantic segmentation of images by the million, as a batch job on Ray.

The modules, in the order in which data meets them:

    classes     Classes: ids, names, palette, ignore_index
    source      URI → what is there, and its bytes
    objects     whole objects of S3, at little cost
    catalog     URI → which scenes there are, and a look at each
    decode      bytes → image, or a reject
    tile        Window, Tiling, Scenes: how images and scenes are cut
    scene       rasters with a place on Earth, and their pixels, a window at a time
    preprocessing  what a model is fed, and which bands of a scene that is
    cut         scenes → windows, each a task's work
    columns     arrays as columns of tables
    architecture  models by name
    onnxgraph   ONNX files → what describes them, and a module
    model       name or checkpoint → module, Classes, preprocessing
    forward     a module's forward pass, fast, and held to float32
    tail        coarse logits → classes and confidence, at full size
    kernel_cpu, kernel_cuda  the tail, compiled
    predict     Predictor, the actor class
    crf         probabilities drawn to the edges of an image
    stitch      weight, accumulate, divide
    labelmap    label maps as PNG, in colour, as masks
    statistics  ConfusionMatrix, IoU
    sink        the label store, written
    store       the label store, read
    session     a Ray cluster to run on
    progress    what a person sees of a run
    label       the chain of all these
    pack        images and targets into shards
    bandfile    windows of scenes as files, in shards
    pairs       shards of pairs: what is in them, and single pairs out of them
    augment     what a pair goes through in training
    feed        which pairs a step sees, and how they come there
    loss        ce, focal, dice, lovasz, ohem
    schedule    optimiser and rates
    learn       one step after the other, alone or with others
    worker      what each worker of Ray Train does
    journal     what a training keeps in its sink
    train       training, from settings to the last word
    curves      a training as a page
    evaluate    a label store against targets
    report      a label store as a page
    picture     windows of scenes, as a person can look at them
    rgb         values of bands as red, green and blue
    export      labelled scenes for a GIS
    cog         label maps of windows → Cloud-Optimised GeoTIFF
    polygons    label maps of windows → polygons
    compact     a label store, its small parts merged
    verify      a label store, read back and proved
    demo        drawn scenes with exact targets
    lock        one writer at a time
    retry       faults that pass
    metrics     what Prometheus is told
    errors      what can go wrong
    cli         the command line
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
