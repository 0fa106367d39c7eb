//! Base weights in few bits, stored so or brought into them: they stay so, in memory and streamed.

use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::Device;
use lora_core::LoraConfig;
use lora_core::frozen::held;
use lora_core::peft::InitLoraWeights;

use super::tests_base::{STREAMED, fixture, load, velocity};
use super::{Base, BaseDtype, Checkpoint, KeptWeights, Layout};
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

#[test]
fn what_was_brought_into_few_bits_is_kept_in_a_file_and_read_from_it_to_the_bit() {
    let folder = fixture("transformer");
    let cache = tempfile::tempdir().expect("temporary folder");
    let device = Device::flex();
    for dtype in [BaseDtype::Q8, BaseDtype::Nf4] {
        let made = load(&folder, of(dtype));
        let config: FluxConfig = made.config().clone();
        let path = cache.path().join(format!("{dtype}.safetensors"));
        let open = || Checkpoint::open(&folder).expect("the fixture");
        let network = || FluxTransformer::new(&config, &device);
        let (_, stream) = open()
            .stream_network(network(), Layout::Diffusers, dtype, &device)
            .expect("the fixture");
        stream.keep(&path, "a key").expect("a writable folder");
        let size = std::fs::metadata(&path).expect("the file").len();
        assert!(size > stream.kept_bytes() && size < stream.kept_bytes() + 20_000);
        let kept = KeptWeights::open(&path, "a key").expect("what was written");
        for base in [of(dtype), Base { dtype, ..STREAMED }] {
            let checkpoint = open().keeping(Some(kept.clone()));
            let found = checkpoint
                .load_network(network(), Layout::Diffusers, base, &device)
                .expect("the same weights");
            assert_eq!(velocity(&found), velocity(&made), "{dtype}");
            if !base.is_streamed {
                assert!(held(&found) == held(&made), "{dtype}");
            }
        }

        // It is read, not made again: one of another storage does not fit, and one that is damaged is found.
        let other = match dtype {
            BaseDtype::Q8 => BaseDtype::Nf4,
            _ => BaseDtype::Q8,
        };
        let checkpoint = open().keeping(Some(kept));
        let misfit = checkpoint.load(network(), Layout::Diffusers, other, &device);
        let misfit = misfit.expect_err("another size").to_string();
        assert!(misfit.contains("in another size"), "{misfit}");
        let problem = |key: &str| KeptWeights::open(&path, key).expect_err("not this file");
        assert_eq!(problem("another key"), "it was made from something else");
        let mut bytes = std::fs::read(&path).expect("the file");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, &bytes).expect("a writable folder");
        assert!(problem("a key").contains("SHA-256 differs"));
        std::fs::write(&path, &bytes[..middle]).expect("a writable folder");
        assert!(problem("a key").contains("cut short"));
    }
}
