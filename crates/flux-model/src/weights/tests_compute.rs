//! Blocks that compute in bf16: near to f32, forward and backward, whatever the weights are kept as.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use lora_core::peft::InitLoraWeights;
use lora_core::{Gradients, LoraConfig};

use super::tests_base::{fixture, input, load_on};
use super::{Base, BaseDtype, Compute};
use crate::network::Velocity;

/// Velocity, and the gradients of a LoRA on every linear layer of the blocks, in the order of their paths.
fn computed(folder: &Path, base: Base) -> [Vec<f32>; 2] {
    let device = Device::flex().autodiff();
    let config = LoraConfig {
        target_modules: ["to_q", "to_v", "proj_mlp", "net.2"].into(),
        init_lora_weights: InitLoraWeights::Random,
        ..LoraConfig::default()
    };
    let network = load_on(folder, base, &device);
    let network =
        lora_core::attach(network, config.fresh(1).fast()).expect("layers of these names");
    let velocity = network
        .forward(input(network.config(), &device))
        .expect("blocks in memory");
    let loss = velocity.clone().square().mean();
    let mut gradients = Gradients::default();
    gradients.take("", &network, &mut loss.backward());
    let values = |tensor: Tensor<1>| tensor.into_data().try_into_vec::<f32>().expect("f32");
    let gradients = gradients.iter().flat_map(|(_, g)| values(g.clone()));
    let numel = velocity.shape().num_elements();
    [
        values(velocity.reshape([numel]).inner()),
        gradients.collect(),
    ]
}

/// `|a - b| / |b|`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().copied().map(square).sum::<f64>()).sqrt()
}

#[test]
fn blocks_in_bf16_are_near_to_f32() {
    let few_bits = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures/parity/transformer_bnb_nf4/model");
    for (folder, dtype) in [
        (fixture("transformer"), BaseDtype::AsStored),
        (fixture("transformer"), BaseDtype::Bf16),
        (fixture("transformer"), BaseDtype::Q8),
        (few_bits, BaseDtype::AsStored),
    ] {
        let of = |compute| Base {
            dtype,
            compute,
            ..Base::default()
        };
        let exact = computed(&folder, of(Compute::F32));
        let found = computed(&folder, of(Compute::Bf16));
        assert!(exact[1].len() > 1000);
        for (what, (found, exact)) in ["velocity", "gradients"]
            .iter()
            .zip(found.iter().zip(&exact))
        {
            let distance = distance(found, exact);
            println!("{} {dtype}: {what} {distance:.2e}", folder.display());
            assert!(
                (1e-5..0.02).contains(&distance),
                "{dtype} {what}: {distance}"
            );
        }
    }
}
