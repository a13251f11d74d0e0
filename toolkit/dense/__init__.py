"""Dense prediction on pretrained backbones: a class for each pixel, or boxes and masks around objects.

`build.build_dense` puts a new head (`heads`, `detector`) on the maps of a Swin transformer (`model`);
`metrics` scores what it predicts.
"""
