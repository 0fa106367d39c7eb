//! Base weights as they are stored, and blocks that stay on disk: the same numbers.

use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use lora_core::LoraConfig;
use lora_core::files::host::Dtype;
use lora_core::files::safetensors::{TensorFile, serialize};
use lora_core::peft::InitLoraWeights;
use lora_core::training::recompute::Blocks;
use tempfile::TempDir;

use super::{Base, BaseDtype, Checkpoint, Compute};
use crate::family::Velocity;
use crate::flux1::config::FluxConfig;
use crate::flux1::latent::{image_positions, text_positions};
use crate::flux1::transformer::{FluxInput, FluxTransformer};
use crate::network_config::NetworkConfig;
use crate::pipeline::read_config;
use crate::text::t5::{T5Config, T5Encoder};

pub(super) const STREAMED: Base = Base {
    dtype: BaseDtype::AsStored,
    is_streamed: true,
    compute: Compute::F32,
};

pub(super) fn fixture(component: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    fixtures.join("parity/pipeline_dev/model").join(component)
}

fn weights_of(folder: &Path) -> PathBuf {
    let files = std::fs::read_dir(folder).expect("the fixture");
    let mut files = files.filter_map(|entry| Some(entry.ok()?.path()));
    let file = files.find(|path| path.extension().is_some_and(|end| end == "safetensors"));
    file.expect("weights")
}

/// A component of the fixture with its weights in `dtype`.
fn stored_as(component: &str, dtype: Dtype) -> TempDir {
    let (from, to) = (fixture(component), tempfile::tempdir().expect("a folder"));
    let config = std::fs::read(from.join("config.json")).expect("the fixture");
    std::fs::write(to.path().join("config.json"), config).expect("a copy");
    let weights = weights_of(&from);
    let file = TensorFile::open(&weights).expect("the fixture");
    let cast = |name: &str| {
        (
            name.to_string(),
            file.read(name).expect("a tensor").cast(dtype),
        )
    };
    let bytes = serialize(&file.names().map(cast).collect(), file.metadata());
    let name = weights.file_name().expect("a file");
    std::fs::write(to.path().join(name), bytes).expect("a copy");
    to
}

pub(super) fn load(folder: &Path, base: Base) -> FluxTransformer {
    load_on(folder, base, &Device::flex())
}

pub(super) fn load_on(folder: &Path, base: Base, device: &Device) -> FluxTransformer {
    FluxConfig::load(folder, None, base, device).expect("a transformer")
}

pub(super) fn input(config: &FluxConfig, device: &Device) -> FluxInput {
    let tensor = |shape: [usize; 3]| {
        let values = (0..shape.iter().product::<usize>()).map(|i| (i as f32 * 0.37).sin());
        let data = TensorData::new(values.collect::<Vec<_>>(), shape);
        Tensor::<3>::from_data(data, device)
    };
    let (height, width, words) = (4, 6, 5);
    FluxInput {
        img: tensor([1, height * width / 4, config.in_channels]),
        txt: tensor([1, words, config.joint_attention_dim]),
        pooled: tensor([1, 1, config.pooled_projection_dim]).squeeze_dim(1),
        sigma: vec![0.7],
        guidance: vec![3.5],
        positions: [text_positions(words), image_positions(height, width)].concat(),
        reference_tokens: 0,
    }
}

pub(super) fn velocity(network: &FluxTransformer) -> Vec<f32> {
    let input = input(network.config(), &Device::flex());
    let velocity = network.forward(input).expect("blocks that can be read");
    velocity.into_data().try_to_vec().expect("f32")
}

/// The types of the weights of linear layers, and of everything else.
fn dtypes(network: &impl Module) -> [Vec<DType>; 2] {
    #[derive(Default)]
    struct Types(Vec<String>, [Vec<DType>; 2]);
    impl ModuleVisitor for Types {
        fn enter_module(&mut self, _: &str, container: &str) {
            self.0.push(container.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let is_linear = D == 2 && self.0.last().is_some_and(|owner| owner == "Struct:Linear");
            self.1[usize::from(!is_linear)].push(param.val().dtype());
        }
    }
    let mut types = Types::default();
    network.visit(&mut types);
    types.1.map(|mut types| {
        types.dedup();
        types
    })
}

#[test]
fn weights_stay_as_they_are_stored_and_give_what_f32_gives() {
    for (stored, kept) in [(Dtype::Bf16, DType::BF16), (Dtype::F16, DType::F16)] {
        let folder = stored_as("transformer", stored);
        let network = load(folder.path(), Base::default());
        assert_eq!(dtypes(&network), [vec![kept], vec![DType::F32]]);
        let as_f32 = Base {
            dtype: BaseDtype::F32,
            ..Base::default()
        };
        let exact = load(folder.path(), as_f32);
        assert_eq!(dtypes(&exact), [[DType::F32], [DType::F32]].map(Vec::from));
        let (found, expected) = (velocity(&network), velocity(&exact));
        let largest = expected.iter().fold(0f32, |top, x| top.max(x.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            let distance = (found - expected).abs() / largest;
            assert!(distance < 2e-6, "{stored}: {found}, not {expected}");
        }
    }
}

#[test]
fn weights_are_rounded_to_bf16_where_that_is_asked_for() {
    let rounded = Base {
        dtype: BaseDtype::Bf16,
        ..Base::default()
    };
    let folder = stored_as("transformer", Dtype::Bf16);
    let network = load(&fixture("transformer"), rounded);
    assert_eq!(
        dtypes(&network),
        [[DType::BF16], [DType::F32]].map(Vec::from)
    );
    let network = load(folder.path(), rounded);
    assert_eq!(
        velocity(&network),
        velocity(&load(folder.path(), Base::default()))
    );
}

#[test]
fn blocks_on_disk_compute_the_bits_of_blocks_in_memory() {
    for stored in [Dtype::F32, Dtype::Bf16] {
        let folder = stored_as("transformer", stored);
        let [resident, streamed] =
            [Base::default(), STREAMED].map(|base| load(folder.path(), base));
        let expected = velocity(&resident);
        assert!(expected.iter().all(|v| v.is_finite()));
        for _ in 0..2 {
            assert_eq!(velocity(&streamed), expected, "{stored}");
        }
        // Adapters sit on what is not in memory as on what is.
        let config = LoraConfig {
            target_modules: ["to_q", "proj_out"].into(),
            init_lora_weights: InitLoraWeights::Random,
            ..LoraConfig::default()
        };
        let [adapted, expected] = [streamed, resident].map(|network| {
            let network = lora_core::attach(network, config.clone().fresh(1).fast());
            velocity(&network.expect("layers of these names").valid())
        });
        assert_eq!(adapted, expected, "{stored}");
        assert_ne!(velocity(&load(folder.path(), STREAMED)), expected);
    }
}

#[test]
fn a_value_that_is_not_finite_is_named_when_its_block_is_read() {
    // bf16 is computed with where the file is mapped.
    for (dtype, not_a_number) in [
        (Dtype::F32, &f32::NAN.to_le_bytes()[..]),
        (Dtype::Bf16, &[0xc0, 0x7f]),
    ] {
        let folder = stored_as("transformer", dtype);
        let weights = weights_of(folder.path());
        let file = TensorFile::open(&weights).expect("a copy");
        let read = |name: &str| (name.to_string(), file.read(name).expect("a tensor"));
        let mut tensors: std::collections::BTreeMap<_, _> = file.names().map(read).collect();
        let name = "single_transformer_blocks.0.proj_out.weight";
        let bytes = &mut tensors.get_mut(name).expect("there").bytes;
        bytes[not_a_number.len()..][..not_a_number.len()].copy_from_slice(not_a_number);
        std::fs::write(&weights, serialize(&tensors, file.metadata())).expect("a copy");
        let error = FluxConfig::load(folder.path(), None, Base::default(), &Device::flex());
        let expected = error.expect_err("not finite").to_string();
        assert!(
            expected.contains(name) && expected.ends_with("element 1"),
            "{expected}"
        );
        let network = load(folder.path(), STREAMED);
        let mut errors =
            (0..Blocks::count(&network)).filter_map(|index| Blocks::block(&network, index).err());
        assert_eq!(errors.next().expect("not finite").to_string(), expected);
        assert!(errors.next().is_none(), "one block");
    }
}

#[test]
fn an_encoder_on_disk_computes_the_bits_of_one_in_memory() {
    let folder = stored_as("text_encoder_2", Dtype::Bf16);
    let device = Device::flex();
    let config: T5Config =
        read_config(&folder.path().join("config.json"), T5Config::problem).expect("the fixture");
    let checkpoint = Checkpoint::open(folder.path()).expect("the fixture");
    let encoder = T5Encoder::open(&config, checkpoint, &device).expect("an encoder");
    let ids = [vec![3, 4, 3, 1], vec![5, 1, 0, 0]];
    let states = |encoder: &T5Encoder, ids: &[Vec<i64>]| -> Vec<f32> {
        let states = encoder
            .forward(ids, &device)
            .expect("blocks that can be read");
        states.into_data().try_to_vec().expect("f32")
    };
    let together = states(&encoder, &ids);
    let apart = [states(&encoder, &ids[..1]), states(&encoder, &ids[1..])].concat();
    assert_eq!(together, apart);
    let resident = encoder.resident().expect("weights that can be read");
    assert_eq!(states(&resident, &ids), together);
}
