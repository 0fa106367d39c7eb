//! Cases of the velocity network: one forward pass, from a component folder or a single file.

use burn::tensor::Device;
use flux_model::family::{Family, Network};
use flux_model::weights::BaseDtype;
use lora_core::files::host::HostTensor;
use lora_core::state::host_tensor;

use super::case::{Case, Tensors};
use super::report::Report;

/// `transformer_forward`.
pub(super) fn component<F: Family>(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let network = F::network_at(
        &case.path("/model/path")?,
        None,
        BaseDtype::AsStored,
        device,
    )?;
    sample(case, &network, device)
}

/// `single_file_transformer`: the file does not say its architecture, but must agree with the one stated.
pub(super) fn single_file<F: Family>(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let (file, config) = (case.path("/checkpoint/file")?, case.value("/config")?);
    sample(
        case,
        &F::network_at(&file, Some(config), BaseDtype::AsStored, device)?,
        device,
    )
}

fn sample<N: Network>(case: &Case, network: &N, device: &Device) -> anyhow::Result<Report> {
    let sample = forward(case, network, device)?;
    Report::by_tensor(case, Tensors::from([("sample".into(), sample)]))
}

/// The velocity of the case's inputs.
pub(super) fn forward<N: Network>(
    case: &Case,
    network: &N,
    device: &Device,
) -> anyhow::Result<HostTensor> {
    let input = network
        .named_input(&case.all_inputs()?, device)
        .map_err(anyhow::Error::msg)?;
    Ok(host_tensor(network.forward(input)?))
}
