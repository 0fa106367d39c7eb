//! Cases of the autoencoders: an image to its latents or their distribution, latents to an image.

use anyhow::{Context, bail};
use burn::tensor::{Device, Tensor};
use flux_model::autoencoder::{AutoencoderConfig, LatentDistribution};
use flux_model::flux1::vae::{Vae, VaeConfig};
use flux_model::pipeline::load_autoencoder;
use lora_core::state::host_tensor;

use super::case::{Case, Tensors};
use super::report::Report;

/// `vae` and `single_file_vae`.
pub(super) fn compute(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let vae = if case.kind == "vae" {
        load_autoencoder(&case.path("/model/path")?, None, device)?
    } else {
        let config: AutoencoderConfig = serde_json::from_value(case.value("/config")?.clone())
            .context("`/config` of case.json")?;
        load_autoencoder(&case.path("/checkpoint/file")?, Some(&config), device)?
    };
    let mut out = Tensors::new();
    if case.has_input("image") {
        let image: Tensor<4> = case.tensor("image", device)?;
        let latents = vae.encode(image.clone());
        let mean = latents.mean.clone();
        out = of_image(
            vae.moments(image),
            latents,
            vae.to_model_space(mean.clone()),
            vae.decode(mean),
        );
    }
    let mut put = |name: &str, tensor: Tensor<4>| {
        out.insert(name.into(), host_tensor(tensor));
    };
    if case.has_input("latent") {
        let latent: Tensor<4> = case.tensor("latent", device)?;
        put("decoded", vae.decode(latent.clone()));
        let own = vae.from_model_space(latent);
        put("decoded_from_model_space", vae.decode(own));
    }
    Report::by_tensor(case, out)
}

/// What a case says of an image.
pub(super) fn of_image(
    moments: Tensor<4>,
    latents: LatentDistribution,
    model_input: Tensor<4>,
    reconstruction: Tensor<4>,
) -> Tensors {
    let std = latents.std();
    let tensors = [
        ("moments", moments),
        ("mean", latents.mean),
        ("logvar", latents.logvar),
        ("std", std),
        ("model_input_from_mean", model_input),
        ("reconstruction", reconstruction),
    ];
    tensors
        .map(|(name, tensor)| (name.to_string(), host_tensor(tensor)))
        .into()
}

/// `tiny_vae`.
pub(super) fn compute_tiny(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let stated = VaeConfig::Kl(AutoencoderConfig::flux());
    let Vae::Tiny(vae) = Vae::load(&case.path("/model/path")?, &stated, device)? else {
        bail!("the model is no AutoencoderTiny");
    };
    let image: Tensor<4> = case.tensor("image", device)?;
    let latent: Tensor<4> = case.tensor("latent", device)?;
    let latents = vae.encode(image);
    let mut out = Tensors::new();
    for (name, tensor) in [
        ("model_input", vae.to_model_space(latents.clone())),
        ("reconstruction", vae.decode(latents.clone())),
        ("latents", latents),
        ("decoded", vae.decode(latent.clone())),
        (
            "decoded_from_model_space",
            vae.decode(vae.from_model_space(latent)),
        ),
    ] {
        out.insert(name.into(), host_tensor(tensor));
    }
    Report::by_tensor(case, out)
}
