"""The foundation models that are baselines, with the sources and licences of their weights."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.errors import check_name

WITHOUT_HUB = "name a folder that holds all of them"  # of the files of a baseline
# The protocols of each family; the first is the default.
PROTOCOLS = {
    "contrastive": ("zero_shot",),
    "features": ("logreg", "knn", "centroid", "ridge", "lda", "linear_grid"),
    "generative": ("likelihood", "generate"),
}

# How weights are held.  nf4: linear layers in four bits, the rest and all arithmetic in bf16; pruned: of
# embedding and logits only the rows that prompt and class names use.
FOUR_BIT_FORMS = ("nf4", "nf4_pruned")
FORMS = ("fp32", "bf16", "fp16", *FOUR_BIT_FORMS)


_REVISIONS = {
    "mtgv/MobileVLM-3B": "28487faeb9b8bf8872e14f4859fbdda477803091",
    "mtgv/MobileVLM_V2-1.7B": "302257f0645a235b757dfe379ddb083a0b3d140f",
    "mtgv/MobileVLM_V2-3B": "9b2d5168505fffdb51470d9c88cdb656ff9338c4",
}


@dataclass(frozen=True)
class Baseline:
    """A foundation model that is evaluated, not fine-tuned."""

    name: str
    family: str  # contrastive | features | generative
    source: str  # contrastive: open_clip's ARCHITECTURE:TAG; features: a backbone; generative: hub repository
    license: str
    kind: str = ""  # generative: idefics3 | smolvlm | paligemma | paligemma2 | mobilevlm | mobilevlm_v2
    gated: bool = False  # the hub asks for consent to the licence first

    @property
    def revision(self) -> str | None:
        """The commit of the hub repository; None: the newest."""
        return _REVISIONS.get(self.source)

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols that it can be evaluated by; the first is the default."""
        return PROTOCOLS[self.family]

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that its weights can have: only generative models are packed in four bits."""
        return FORMS if self.family == "generative" else ("fp32", "bf16", "fp16")


_GEMMA = {"license": "gemma", "gated": True}
_SMOL = "HuggingFaceTB/Smol"

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        # The names of architectures include the activation of the weights (`-quickgelu`).
        Baseline("clip_b32", "contrastive", "ViT-B-32-quickgelu:openai", "mit"),
        Baseline("openclip_b32", "contrastive", "ViT-B-32:laion2b_s34b_b79k", "mit"),
        Baseline("openclip_b32_256", "contrastive", "ViT-B-32-256:datacomp_s34b_b86k", "mit"),
        Baseline("openclip_b16", "contrastive", "ViT-B-16:datacomp_xl_s13b_b90k", "mit"),
        Baseline("openclip_l14", "contrastive", "ViT-L-14:datacomp_xl_s13b_b90k", "mit"),
        Baseline("siglip_b16", "contrastive", "ViT-B-16-SigLIP:webli", "apache-2.0"),
        Baseline("siglip_b16_512", "contrastive", "ViT-B-16-SigLIP-512:webli", "apache-2.0"),
        Baseline("siglip2_b32_256", "contrastive", "ViT-B-32-SigLIP2-256:webli", "apache-2.0"),
        Baseline("siglip2_b16", "contrastive", "ViT-B-16-SigLIP2:webli", "apache-2.0"),
        Baseline("demo_vit", "features", "demo_vit", "apache-2.0"),
        Baseline("dinov2_s", "features", "vit_small_patch14_dinov2.lvd142m", "apache-2.0"),
        Baseline("dinov2_s_reg", "features", "vit_small_patch14_reg4_dinov2.lvd142m", "apache-2.0"),
        Baseline("dinov2_b", "features", "vit_base_patch14_dinov2.lvd142m", "apache-2.0"),
        Baseline("dinov2_b_reg", "features", "vit_base_patch14_reg4_dinov2.lvd142m", "apache-2.0"),
        Baseline("dinov3_s", "features", "vit_small_patch16_dinov3.lvd1689m", "dinov3-license"),
        Baseline("dinov3_b", "features", "vit_base_patch16_dinov3.lvd1689m", "dinov3-license"),
        Baseline("smolvlm_256m", "generative", f"{_SMOL}VLM-256M-Instruct", "apache-2.0", "idefics3"),
        Baseline("smolvlm_500m", "generative", f"{_SMOL}VLM-500M-Instruct", "apache-2.0", "idefics3"),
        Baseline("smolvlm", "generative", f"{_SMOL}VLM-Instruct", "apache-2.0", "idefics3"),
        Baseline("smolvlm2_256m", "generative", f"{_SMOL}VLM2-256M-Video-Instruct", "apache-2.0", "smolvlm"),
        Baseline("smolvlm2_500m", "generative", f"{_SMOL}VLM2-500M-Video-Instruct", "apache-2.0", "smolvlm"),
        Baseline("smolvlm2", "generative", f"{_SMOL}VLM2-2.2B-Instruct", "apache-2.0", "smolvlm"),
        Baseline("paligemma", "generative", "google/paligemma-3b-mix-224", kind="paligemma", **_GEMMA),
        Baseline("paligemma2", "generative", "google/paligemma2-3b-mix-224", kind="paligemma2", **_GEMMA),
        Baseline("mobilevlm_1.7b", "generative", "mtgv/MobileVLM-1.7B", "apache-2.0", "mobilevlm"),
        Baseline("mobilevlm_3b", "generative", "mtgv/MobileVLM-3B", "apache-2.0", "mobilevlm"),
        Baseline("mobilevlm_v2_1.7b", "generative", "mtgv/MobileVLM_V2-1.7B", "apache-2.0", "mobilevlm_v2"),
        Baseline("mobilevlm_v2_3b", "generative", "mtgv/MobileVLM_V2-3B", "apache-2.0", "mobilevlm_v2"),
    )
}


def baseline_named(name: str) -> Baseline:
    """The baseline `name`; raises `InputError` with the nearest match."""
    return BASELINES[check_name("baseline", name, BASELINES)]
