//! Base weights in few bits, stored so or brought into them: they stay so, in memory and streamed.

use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::Device;
use lora_core::LoraConfig;
use lora_core::frozen::held;
use lora_core::peft::InitLoraWeights;

use super::tests_base::{STREAMED, fixture, load, velocity};
use super::{Base, BaseDtype, Checkpoint, Layout};
use crate::flux1::config::FluxConfig;
use crate::flux1::transformer::FluxTransformer;
use crate::weights::tensors_of;

fn of(dtype: BaseDtype) -> Base {
    Base {
        dtype,
        ..Base::default()
    }
}

/// `|a - b| / |b|`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().copied().map(square).sum::<f64>()).sqrt()
}

fn adapted(network: FluxTransformer) -> Vec<f32> {
    let config = LoraConfig {
        target_modules: ["to_q", "proj_out"].into(),
        init_lora_weights: InitLoraWeights::Random,
        ..LoraConfig::default()
    };
    let network = lora_core::attach(network, config.fresh(1).fast());
    velocity(&network.expect("layers of these names").valid())
}

#[test]
fn what_is_stored_in_few_bits_stays_so_and_gives_what_f32_gives() {
    for case in [
        "transformer_bnb_nf4",
        "transformer_bnb_fp4",
        "transformer_bnb_int8",
    ] {
        let cases = "../../tests/fixtures/parity";
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(cases);
        let folder = root.join(case).join("model");
        let network = load(&folder, Base::default());
        let exact = load(&folder, of(BaseDtype::F32));
        assert!(held(&network).len() > 20 && held(&exact).is_empty());
        let wanted = |key: &str| key == "x_embedder.weight" || key == "proj_out.weight";
        let (tensors, expected) = (tensors_of(&network, wanted), tensors_of(&exact, wanted));
        assert_eq!(tensors["x_embedder.weight"], expected["x_embedder.weight"]);
        assert!(
            distance(&velocity(&network), &velocity(&exact)) < 1e-6,
            "{case}"
        );
        let streamed = load(&folder, STREAMED);
        assert!(held(&streamed).len() < 20);
        for _ in 0..2 {
            assert_eq!(velocity(&streamed), velocity(&network), "{case}");
        }
        let expected = adapted(network);
        assert_eq!(adapted(streamed), expected, "{case}");
        assert!(distance(&adapted(exact), &expected) < 1e-6, "{case}");
    }
}

#[test]
fn what_is_stored_in_many_bits_is_brought_into_few_where_that_is_asked_for() {
    let folder = fixture("transformer");
    let exact = velocity(&load(&folder, of(BaseDtype::F32)));
    let dense = 4 * 8; // bits of an f32
    for (dtype, bits, error) in [
        (BaseDtype::Q8, 9, 1e-3..0.03),
        (BaseDtype::Nf4, 5, 0.01..0.5),
    ] {
        let network = load(&folder, of(dtype));
        let weights = held(&network);
        let [numel, bytes] = weights.values().fold([0, 0], |[numel, bytes], weight| {
            [numel + weight.numel(), bytes + weight.bytes()]
        });
        assert!(weights.len() > 20 && bytes * 8 <= numel * bits, "{bytes}");
        let found = velocity(&network);
        assert!(error.contains(&distance(&found, &exact)), "{dtype}");
        let streamed = Base { dtype, ..STREAMED };
        assert_eq!(velocity(&load(&folder, streamed)), found, "{dtype}");

        // What is said before it is what it takes.
        let device = Device::flex();
        let checkpoint = Checkpoint::open(&folder).expect("the fixture");
        let config: FluxConfig = network.config().clone();
        let sizes = |dtype| {
            let network = FluxTransformer::new(&config, &device);
            let sizes = checkpoint.sizes(&network, Layout::Diffusers, dtype, &device);
            sizes.rest + sizes.blocks.iter().map(|block| block.weights).sum::<u64>()
        };
        let saved = sizes(BaseDtype::F32) - sizes(dtype);
        let expected = (numel * dense / 8 - bytes) as u64;
        assert!(
            saved.abs_diff(expected) * 20 < expected,
            "{saved}, not {expected}"
        );
    }
}
