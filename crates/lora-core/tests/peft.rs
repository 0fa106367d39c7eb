//! Adapters of every kind against PEFT 0.19.1: its files, its outputs, its gradients, its merged weights.
//!
//! `tests/reference/peft_adapters.py` made `fixtures/peft`: per case an adapter with random factors, as PEFT saved it,
//! and what PEFT computed with it. Everything is f32 on both sides; sums of a few hundred products differ in the last bits,
//! so values agree to 1e-5 of the largest one.
//!
//! With `PEFT_OUT=DIR` set, `our_folders_hold_what_peft_saved` also leaves its folders in DIR for `peft_adapters.py --load DIR`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{
    Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, PaddingConfig2d,
};
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Int, Tensor, TensorData};
use lora_core::attach::Plan;
use lora_core::edit::{adapter_names, delete_adapter};
use lora_core::files::host::HostTensor;
use lora_core::files::safetensors::TensorFile;
use lora_core::peft::{InitLoraWeights, OneOrMany, PeftType, Targets};
use lora_core::state::{adapter_state, host_tensor, trainable_parameters};
use lora_core::training::OptimizerState;
use lora_core::*;

#[derive(Module, Debug)]
struct Block {
    fc: Linear,
    out: Linear,
}

#[derive(Module, Debug)]
struct Body {
    blocks: Vec<Block>,
    norm: LayerNorm,
}

/// The model of `peft_adapters.py`.
#[derive(Module, Debug)]
struct Net {
    embed: Embedding,
    conv: Conv2d,
    point: Conv2d,
    body: Body,
    head: Linear,
}

impl Net {
    fn new(device: &Device) -> Self {
        let block = || Block {
            fc: LinearConfig::new(8, 12).init(device),
            out: LinearConfig::new(12, 8).init(device),
        };
        let net = Self {
            embed: EmbeddingConfig::new(7, 8).init(device),
            conv: Conv2dConfig::new([4, 6], [3, 3])
                .with_stride([2, 2])
                .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
                .init(device),
            point: Conv2dConfig::new([6, 8], [1, 1]).init(device),
            body: Body {
                blocks: vec![block(), block()],
                norm: LayerNormConfig::new(8).init(device),
            },
            head: LinearConfig::new(8, 4).init(device),
        };
        net.map(&mut Load {
            path: Vec::new(),
            owner: Vec::new(),
            values: tensors("model.safetensors"),
            device: device.clone(),
        })
    }

    /// `linear` computes the linear layers: the dense path or the fast one.
    fn forward(
        &self,
        linear: &dyn Fn(&Linear, Tensor<2>) -> Tensor<2>,
        device: &Device,
    ) -> Tensor<2> {
        let values = tensors("model.safetensors");
        let tokens: Vec<i64> = values["tokens"]
            .to_f32()
            .iter()
            .map(|v| *v as i64)
            .collect();
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [2, 3]), device);
        let image = TensorData::new(values["image"].to_f32(), [2, 4, 6, 6]);
        let image = Tensor::<4>::from_data(image, device);
        let text: Tensor<2> = self.embed.forward(tokens).mean_dim(1).reshape([2, 8]);
        let picture = self.point.forward(self.conv.forward(image).tanh());
        let picture: Tensor<2> = picture.reshape([2, 8, 9]).mean_dim(2).reshape([2, 8]);
        let mut x = text + picture;
        for block in &self.body.blocks {
            x = x.clone() + linear(&block.out, linear(&block.fc, x).tanh());
        }
        linear(&self.head, self.body.norm.forward(x))
    }

    fn dense(&self, device: &Device) -> Tensor<2> {
        self.forward(&|layer, x| layer.forward(x), device)
    }

    fn fast(&self, device: &Device) -> Tensor<2> {
        self.forward(&|layer, x| lora_core::linear(layer, x), device)
    }
}

/// Fills a model from PyTorch's tensors.
struct Load {
    path: Vec<String>,
    owner: Vec<String>,
    values: BTreeMap<String, HostTensor>,
    device: Device,
}

impl ModuleMapper for Load {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push(name.into());
        self.owner.push(container.into());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
        self.owner.pop();
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self
            .path
            .join(".")
            .replace("gamma", "weight")
            .replace("beta", "bias");
        let value = &self.values[&format!("model.{name}")];
        let data = TensorData::new(value.to_f32(), value.shape.clone());
        let tensor = Tensor::<D>::from_data(data, &self.device);
        let is_linear = self
            .owner
            .last()
            .is_some_and(|owner| owner == "Struct:Linear");
        let tensor = if is_linear && D == 2 {
            tensor.swap_dims(0, 1)
        } else {
            tensor
        };
        Param::initialized(param.id, tensor)
    }
}

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/peft"))
}

fn tensors(name: &str) -> BTreeMap<String, HostTensor> {
    let file = TensorFile::open(&fixtures().join(name)).expect("a fixture");
    let read = |key: &str| (key.to_string(), file.read(key).expect("a tensor"));
    file.names().map(read).collect()
}

fn close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f32, |max, v| max.max(v.abs()));
    let error = found
        .iter()
        .zip(expected)
        .fold(0f32, |max, (a, b)| max.max((a - b).abs()));
    assert!(error <= 1e-5 * largest.max(1.0), "{what}: off by {error}");
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    host_tensor(tensor).to_f32()
}

const CASES: [&str; 10] = [
    "lora",
    "rslora",
    "dora",
    "layers",
    "saved",
    "bias_all",
    "loha",
    "lokr",
    "lokr_both",
    "lokr_full",
];

fn load(case: &str) -> AdapterFile {
    AdapterFile::load_peft(&fixtures().join(case)).expect(case)
}

fn attach(net: Net, file: AdapterFile) -> Net {
    let config = file.config();
    lora_core::attach(net, file.stored().agreeing_with(&config)).expect("fits the model")
}

#[test]
fn outputs_and_merged_weights_are_pefts() {
    let device = Device::flex();
    let net = Net::new(&device);
    close(
        &values(net.dense(&device)),
        &tensors("model.safetensors")["output"].to_f32(),
        "base",
    );
    for case in CASES {
        let expected = tensors(&format!("{case}/expected.safetensors"));
        let adapted = attach(net.clone(), load(case));
        let output = expected["output"].to_f32();
        close(&values(adapted.dense(&device)), &output, case);
        close(&values(adapted.fast(&device)), &output, case);
        let base = values(net.dense(&device));
        assert_ne!(
            values(adapted.dense(&device)),
            base,
            "{case} changes the output"
        );
        let merged = merge(adapted.clone()).expect("mergeable");
        assert!(adapter_names(&merged).is_empty());
        close(
            &values(merged.dense(&device)),
            &expected["merged"].to_f32(),
            case,
        );
        let of_linear = |layer: &Linear| values(layer.weight.val().transpose());
        for (name, found) in [
            ("embed", values(merged.embed.weight.val())),
            ("conv", values(merged.conv.weight.val())),
            ("body.blocks.1.fc", of_linear(&merged.body.blocks[1].fc)),
            ("head", of_linear(&merged.head)),
        ] {
            let weight = expected[&format!("weight.{name}")].to_f32();
            close(&found, &weight, &format!("{case} {name}"));
        }
        assert_eq!(values(detach(adapted).dense(&device)), base, "{case}");
    }
}

/// Gradients by the names of the adapter file: our parameters are flat or transposed, so a step of size -1 without momentum
/// is made on a copy and its file compared.
#[test]
fn gradients_are_pefts() {
    let device = Device::flex();
    let autodiff = device.clone().autodiff();
    let net = Net::new(&autodiff);
    for case in CASES {
        let expected = tensors(&format!("{case}/expected.safetensors"));
        let adapted = attach(net.clone(), load(case));
        for fast in [false, true] {
            let output = match fast {
                true => adapted.fast(&autodiff),
                false => adapted.dense(&autodiff),
            };
            let mut gradients = Gradients::default();
            gradients.take("", &adapted, &mut output.square().sum().backward());
            let before = AdapterFile::from_model(&adapted, "default", None).expect("attached");
            let descent = burn::optim::SgdConfig::new().build();
            let mut stepped = adapted.clone();
            PathOptimizer::new(descent)
                .step(1.0, &mut stepped, gradients)
                .expect("every trainable parameter has a gradient");
            let after = AdapterFile::from_model(&stepped, "default", None).expect("attached");
            let mut compared = 0;
            let named = |file: &AdapterFile| {
                let dir = tempfile::tempdir().expect("a folder");
                file.save_peft(dir.path()).expect("written");
                let path = dir.path().join("adapter_model.safetensors");
                let file = TensorFile::open(&path).expect("ours");
                file.names()
                    .map(|key| (key.to_string(), file.read(key).expect("ours")))
                    .collect::<BTreeMap<_, _>>()
            };
            let (before, after) = (named(&before), named(&after));
            for (name, before) in before {
                let gradient = &expected[&format!("grad.{name}")];
                assert_eq!(before.shape, gradient.shape, "{case} {name}");
                let moved = before
                    .to_f32()
                    .iter()
                    .zip(after[&name].to_f32())
                    .map(|(a, b)| a - b)
                    .collect::<Vec<_>>();
                close(
                    &moved,
                    &gradient.to_f32(),
                    &format!("{case} {name}, fast {fast}"),
                );
                compared += 1;
            }
            let trained = expected
                .keys()
                .filter(|key| key.starts_with("grad."))
                .count();
            assert_eq!(compared, trained, "{case}");
        }
    }
}

#[test]
fn our_folders_hold_what_peft_saved() {
    let device = Device::flex();
    let net = Net::new(&device);
    let keep = std::env::var_os("PEFT_OUT").map(PathBuf::from);
    let scratch = tempfile::tempdir().expect("a folder");
    for case in CASES {
        let stored = load(case);
        let config = stored.config();
        let adapted = attach(net.clone(), stored.clone());
        let file = AdapterFile::from_model(&adapted, "default", Some(&config)).expect("attached");
        let dir = keep.as_deref().unwrap_or(scratch.path()).join(case);
        file.save_peft(&dir).expect("written");
        let output = format!("{:?}", values(adapted.dense(&device)));
        std::fs::write(dir.join("output.json"), output).expect("written");
        let own = TensorFile::open(&dir.join("adapter_model.safetensors")).expect("ours");
        let theirs = tensors(&format!("{case}/adapter_model.safetensors"));
        assert_eq!(own.names().count(), theirs.len(), "{case}");
        for (key, tensor) in theirs {
            assert_eq!(
                own.read(&key).expect("the same key"),
                tensor,
                "{case} {key}"
            );
        }
        assert_eq!(AdapterFile::load_peft(&dir).expect("ours"), file, "{case}");
        let bytes = file.to_bytes("net.");
        let read = AdapterFile::from_bytes("x".as_ref(), bytes, "net.").expect("ours");
        assert_eq!(read, file, "{case}");
    }
}

/// Factors that a fresh adapter leaves at zero, so that it changes nothing at first.
const ZERO: [&str; 5] = [
    "lora_B.weight",
    "lora_embedding_A",
    "hada_w2_b",
    "lokr_w1",
    "lokr_w1_a",
];

#[test]
fn fresh_adapters_have_pefts_tensors() {
    let net = Net::new(&Device::flex());
    for case in CASES {
        let config = LoraConfig {
            init_lora_weights: InitLoraWeights::Default,
            ..load(case).config()
        };
        let net = Plan::new(&net, config.clone().fresh(4))
            .expect("valid")
            .apply(net.clone())
            .expect("attached");
        let dir = tempfile::tempdir().expect("a folder");
        let file = AdapterFile::from_model(&net, "default", Some(&config)).expect("attached");
        file.save_peft(dir.path()).expect("written");
        let ours = TensorFile::open(&dir.path().join("adapter_model.safetensors")).expect("ours");
        let theirs = tensors(&format!("{case}/adapter_model.safetensors"));
        assert!(ours.names().eq(theirs.keys()), "{case}");
        for (key, tensor) in theirs {
            let own = ours.read(&key).expect("the same key");
            assert_eq!(own.shape, tensor.shape, "{case} {key}");
            let is_adapter = ["lora_", "hada_", "lokr_"]
                .iter()
                .any(|part| key.contains(part));
            if is_adapter {
                let is_zero = own.to_f32().iter().all(|v| *v == 0.0);
                assert_eq!(
                    is_zero,
                    ZERO.iter().any(|end| key.ends_with(end)),
                    "{case} {key}"
                );
            }
        }
    }
}

#[test]
fn a_grouped_convolution_of_peft_is_refused() {
    #[derive(Module, Debug)]
    struct Grouped {
        conv: Conv2d,
    }
    let device = Device::flex();
    let conv = Conv2dConfig::new([4, 6], [3, 3])
        .with_groups(2)
        .init(&device);
    let path = fixtures().join("grouped.safetensors");
    let file = AdapterFile::load(&path, "base_model.model.").expect("an adapter");
    let error = Plan::new(&Grouped { conv }, file.stored());
    assert_eq!(
        error.expect_err("no change of the weight").to_string(),
        "tensor `conv.lora_A`: expected shape [2, 2, 3, 3], found [2, 4, 3, 3]"
    );
}

fn train(net: &mut Net, optimizer: &mut PathOptimizer, steps: std::ops::Range<u64>) {
    let device = Device::flex().autodiff();
    for _ in steps {
        let mut gradients = Gradients::default();
        let loss = net.fast(&device).square().sum();
        gradients.take("", net, &mut loss.backward());
        optimizer
            .step(1e-2, net, gradients)
            .expect("complete gradients");
    }
}

#[test]
fn every_kind_resumes_in_the_same_bits() {
    let device = Device::flex();
    let base = Net::new(&device.clone().autodiff());
    let frozen = values(base.body.norm.gamma.val().inner());
    for case in CASES {
        let config = LoraConfig {
            init_lora_weights: InitLoraWeights::Default,
            ..load(case).config()
        };
        let fresh = || {
            let plan = Plan::new(&base, config.clone().fresh(4));
            let net = plan.expect("valid").apply(base.clone()).expect("attached");
            (net, PathOptimizer::new(AdamWConfig::new().build()))
        };
        let (mut straight, mut optimizer) = fresh();
        let start = values(straight.dense(&device.clone().autodiff()).inner());
        if !config.use_dora {
            close(
                &start,
                &tensors("model.safetensors")["output"].to_f32(),
                case,
            );
        }
        train(&mut straight, &mut optimizer, 0..5);
        let (mut stopped, mut half) = fresh();
        train(&mut stopped, &mut half, 0..2);
        let bytes = AdapterFile::from_model(&stopped, "default", Some(&config))
            .expect("attached")
            .to_bytes("");
        let state = half.state();
        let file = AdapterFile::from_bytes("x".as_ref(), bytes, "").expect("ours");
        let state = OptimizerState::from_bytes("y".as_ref(), state.to_bytes(), state.scalars)
            .expect("ours");
        let resumed = TrainingRecord::new(file, state, 2)
            .restore_adapters(base.clone(), |file| file.stored().agreeing_with(&config))
            .expect("fits")
            .restore_optimizer(AdamWConfig::new().build(), &device)
            .expect("complete")
            .restore_progress();
        let (mut model, mut rest) = (resumed.model, resumed.optimizer);
        train(&mut model, &mut rest, resumed.progress..5);
        assert_eq!(adapter_state(&model), adapter_state(&straight), "{case}");
        assert_eq!(rest.state().tensors, optimizer.state().tensors, "{case}");
        for (path, tensor) in adapter_state(&straight) {
            assert_ne!(
                tensor,
                adapter_state(&fresh().0)[&path],
                "{case} trains {path}"
            );
        }
        assert_eq!(
            values(detach(model).body.norm.gamma.val().inner()),
            frozen,
            "{case}"
        );
    }
}

#[test]
fn two_adapters_cannot_train_one_parameter_at_once() {
    let base = Net::new(&Device::flex().autodiff());
    let with = |net: &Net, name: &str, seed| {
        let config = LoraConfig {
            target_modules: Targets::List(vec!["fc".into()]),
            modules_to_save: vec!["head".into()],
            ..LoraConfig::default()
        };
        Plan::new(net, config.clone().fresh(seed).named(name))
            .map(|plan| plan.apply(net.clone()).expect("attached"))
    };
    let one = with(&base, "a", 1).expect("free");
    let error = with(&one, "b", 2).expect_err("taken").to_string();
    assert!(
        error.starts_with("adapter `a` trains `head.bias` in full as well"),
        "{error}"
    );
    let both = with(&set_adapters(one, &[]).expect("attached"), "b", 2).expect("a is off");
    let error = set_adapters(both.clone(), &[("a", 1.0), ("b", 1.0)])
        .expect_err("both")
        .to_string();
    assert!(
        error.contains("adapters a, b all train `head.bias` in full"),
        "{error}"
    );
    let back = set_adapters(both, &[("a", 1.0)]).expect("one of them");
    let trained = trainable_parameters(&back);
    assert!(trained.contains_key("head.weight.adapter.a.whole"));
    assert!(!trained.contains_key("head.weight.adapter.b.whole"));
    // What is deleted can be attached anew.
    let none = delete_adapter(delete_adapter(back, "a").expect("a"), "b").expect("b");
    assert_eq!(adapter_names(&with(&none, "c", 3).expect("free")), ["c"]);
}

#[test]
fn what_a_configuration_cannot_mean_is_refused() {
    let net = Net::new(&Device::flex());
    let refuse = |config: LoraConfig| {
        Plan::new(&net, config.clone().fresh(1).fast())
            .expect_err("refused")
            .to_string()
    };
    let list = |names: &[&str]| Targets::List(names.iter().map(|name| name.to_string()).collect());
    let on = |names: &[&str]| LoraConfig {
        target_modules: list(names),
        ..LoraConfig::default()
    };
    let error = refuse(LoraConfig {
        lora_dropout: 0.1,
        ..on(&["conv"])
    });
    assert!(error.contains("`lora_dropout` needs a model that computes its layers with `lora_core::linear`, which `conv.weight` is not"), "{error}");
    let error = refuse(LoraConfig {
        lora_bias: true,
        ..on(&["embed"])
    });
    assert_eq!(
        error,
        "`embed` is an embedding, which `lora_bias` does not adapt"
    );
    let error = refuse(LoraConfig {
        peft_type: PeftType::Lokr,
        ..on(&["embed"])
    });
    assert_eq!(
        error,
        "`embed` is an embedding, which `peft_type` LOKR does not adapt"
    );
    let error = refuse(LoraConfig {
        peft_type: PeftType::Loha,
        use_dora: true,
        ..on(&["fc"])
    });
    assert_eq!(
        error,
        "`use_dora` has no meaning for `peft_type` LOHA; remove it"
    );
    let error = refuse(LoraConfig {
        decompose_both: true,
        ..on(&["fc"])
    });
    assert_eq!(
        error,
        "`decompose_both` has no meaning for `peft_type` LORA; remove it"
    );
    let error = refuse(LoraConfig {
        layers_pattern: Some(OneOrMany::One("blocks".into())),
        ..on(&["fc"])
    });
    assert_eq!(error, "`layers_pattern` needs `layers_to_transform`");
    let error = refuse(LoraConfig {
        modules_to_save: vec!["tail".into()],
        ..on(&["fc"])
    });
    assert!(
        error.starts_with("`tail` of `modules_to_save` names no module"),
        "{error}"
    );
    // A stored adapter that another configuration would not give.
    let disagree = |stored: AdapterFile, config: LoraConfig| {
        Plan::new(&net, stored.stored().agreeing_with(&config).fast())
            .expect_err("disagrees")
            .to_string()
    };
    let stored = load("lokr");
    let config = LoraConfig {
        decompose_factor: 4,
        ..stored.config()
    };
    let error = disagree(stored, config);
    assert!(
        error.contains("`decompose_factor` is 4 in the configuration but -1 in the stored adapter"),
        "{error}"
    );
    let stored = load("saved");
    let config = LoraConfig {
        modules_to_save: vec!["head".into()],
        ..stored.config()
    };
    let error = disagree(stored, config);
    assert!(error.contains("`modules_to_save` is [\"head\"]"), "{error}");
    // "all-linear" is linear layers, not every weight that can be adapted.
    let config = LoraConfig {
        target_modules: Targets::Pattern("all-linear".into()),
        ..LoraConfig::default()
    };
    let plan = Plan::new(&net, config.clone().fresh(1).fast()).expect("valid");
    assert_eq!(
        plan.layers().collect::<Vec<_>>(),
        [
            "body.blocks.0.fc",
            "body.blocks.0.out",
            "body.blocks.1.fc",
            "body.blocks.1.out",
            "head"
        ]
    );
}
