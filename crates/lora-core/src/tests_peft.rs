//! Against PEFT 0.19.1: combinations and merged weights. `tests/reference/peft_init_and_weights.py` made the
//! numbers; f32 on both sides, so 1e-5 of the norm is rounding and no more.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor, TensorData};

use crate::adapters::Adapters;
use crate::attach::Plan;
use crate::combine::{Combination, add_weighted_adapter};
use crate::edit::adapter_names;
use crate::files::host::HostTensor;
use crate::files::safetensors::TensorFile;
use crate::kinds::parts::{LORA_A, LORA_B};
use crate::kinds::{AdapterSpec, Factors, ModuleAdapter};
use crate::merge::safe_merge;
use crate::peft::{InitLoraWeights, Targets};
use crate::test_model::{Mlp, distance, values};
use crate::*;

fn path(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft_combine");
    root.join(format!("{name}.safetensors"))
}

pub(crate) struct Expected(TensorFile);

impl Expected {
    pub(crate) fn new() -> Self {
        Self(TensorFile::open(&path("expected")).expect("fixture"))
    }
    pub(crate) fn read(&self, key: &str) -> HostTensor {
        self.0.read(key).expect(key)
    }
    pub(crate) fn assert_near(&self, key: &str, found: &[f32]) {
        let d = distance(found, &self.read(key).to_f32());
        assert!(d < 1e-5, "{key}: {d}");
    }
    pub(crate) fn x(&self, device: &Device) -> Tensor<2> {
        Tensor::from_data(TensorData::new(self.read("x").to_f32(), [5, 12]), device)
    }
    /// The base model.
    pub(crate) fn model(&self, device: &Device) -> Mlp {
        struct Fill<'a>(Vec<String>, &'a Expected, Device);
        impl ModuleMapper for Fill<'_> {
            fn enter_module(&mut self, name: &str, _: &str) {
                self.0.push(name.into());
            }
            fn exit_module(&mut self, _: &str, _: &str) {
                self.0.pop();
            }
            fn map_float<const D: usize>(&mut self, p: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let mut tensor = self.1.read(&format!("base.{}", self.0.join(".")));
                if D == 2 {
                    tensor = tensor.transposed();
                }
                let data = TensorData::new(tensor.to_f32(), tensor.shape);
                Param::initialized(p.id, Tensor::from_data(data, &self.2))
            }
        }
        Mlp::new(12, device).map(&mut Fill(Vec::new(), self, device.clone()))
    }
    fn with(&self, names: &[&str], device: &Device) -> Mlp {
        names.iter().fold(self.model(device), |model, name| {
            Plan::new(&model, file(name).stored().named(name).fast())
                .expect("fits")
                .apply(model)
                .expect("attached")
        })
    }
}

fn file(name: &str) -> AdapterFile {
    AdapterFile::load(&path(name), "").expect("adapter")
}

/// `scale * B A` of a layer as `[out, in]` values.
pub(crate) fn deltas(model: &Mlp, name: &str) -> BTreeMap<String, Vec<f32>> {
    let layer = |linear: &burn::nn::Linear| {
        let lora = linear
            .weight
            .reparameterization::<Adapters>()
            .expect("adapted");
        let adapter = lora.adapters().iter().find(|a| a.name() == name);
        values(adapter.expect("attached").delta().expect("LoRA"))
    };
    [("up", layer(&model.up)), ("down", layer(&model.down))]
        .map(|(name, delta)| (name.to_string(), delta))
        .into()
}

fn transposed(tensor: Tensor<2>) -> Vec<f32> {
    values(tensor.transpose())
}

#[test]
fn weighted_combinations_are_those_of_peft() {
    let (expected, device) = (Expected::new(), Device::flex());
    // PEFT's svd counts each scale twice: its weights 0.6 and 0.9 are 0.6 * 5/3 and 0.9 * 7/2 here.
    let twice = [("r3", 0.6 * 5.0 / 3.0), ("r2_up", 0.9 * 7.0 / 2.0)];
    let svd = |rank| Combination::Svd { rank: Some(rank) };
    type Case<'a> = (&'a str, &'a [(&'a str, f64)], Combination);
    let cases: [Case; 5] = [
        (
            "linear",
            &[("r3", 0.7), ("r3_low", -0.4)],
            Combination::Linear,
        ),
        ("cat", &[("r3", 0.7), ("r2_up", 1.3)], Combination::Cat),
        ("svd_scale_1", &[("r2", 0.6), ("r4", -0.9)], svd(3)),
        ("svd", &twice, svd(2)),
        ("single", &[("r3", -0.5)], Combination::Cat),
    ];
    for (case, adapters, combination) in cases {
        let names: Vec<&str> = adapters.iter().map(|(name, _)| *name).collect();
        let model = expected.with(&names, &device);
        let before = values(model.fast(expected.x(&device)));
        let model = add_weighted_adapter(model, adapters, "new", combination).expect(case);
        assert_eq!(values(model.fast(expected.x(&device))), before); // not active
        for (layer, delta) in deltas(&model, "new") {
            expected.assert_near(&format!("{case}.{layer}.delta"), &delta);
        }
        if case == "linear" {
            let file = AdapterFile::from_model(&model, "new", None).expect("attached");
            for (layer, module) in file.modules() {
                expected.assert_near(
                    &format!("{case}.{layer}.lora_A"),
                    &module.factors[LORA_A].to_f32(),
                );
                expected.assert_near(
                    &format!("{case}.{layer}.lora_B"),
                    &module.factors[LORA_B].to_f32(),
                );
            }
        }
    }
}

#[test]
fn what_cannot_be_combined_is_refused() {
    let refuse = |names: &[&str], combination| {
        let files: Vec<AdapterFile> = names.iter().map(|name| file(name)).collect();
        let weighted: Vec<(&AdapterFile, f64)> = files.iter().map(|file| (file, 1.0)).collect();
        AdapterFile::combine(&weighted, combination)
            .expect_err("refused")
            .to_string()
    };
    assert_eq!(
        refuse(&["r3", "r4"], Combination::Linear),
        "`down` has ranks 3 and 4; a linear combination needs equal ones, `cat` and `svd` do not"
    );
    assert!(refuse(&["r3", "dora"], Combination::Cat).contains("cannot be combined"));
    assert!(refuse(&["with_bias", "r3"], Combination::Cat).contains("cannot be combined"));
    assert_eq!(
        refuse(&[], Combination::Cat),
        "there are no adapters to combine"
    );
    let one_layer = |out: usize, a: &[f32]| {
        let inputs = a.len();
        let spec = AdapterSpec {
            rank: 1,
            alpha: 1.0,
            use_rslora: false,
            dropout: 0.0,
        };
        let factors = Factors::lora(
            HostTensor::from_f32([1, inputs], a),
            HostTensor::from_f32([out, 1], &vec![1.0; out]),
        );
        let module = ModuleAdapter::new(spec, factors);
        AdapterFile::new(BTreeMap::from([("fc".to_string(), module)]))
    };
    let good = one_layer(3, &[1.0, 2.0]);
    let both = |other: &AdapterFile, combination| {
        AdapterFile::combine(&[(&good, 1.0), (other, 1.0)], combination)
            .expect_err("refused")
            .to_string()
    };
    let svd = Combination::Svd { rank: None };
    for combination in [Combination::Linear, Combination::Cat, svd] {
        assert_eq!(
            both(&one_layer(3, &[1.0, 2.0, 3.0]), combination),
            "`fc` is a layer [3, 2] in one adapter and [3, 3] in another: are they for the same model?"
        );
        assert!(both(&one_layer(4, &[1.0, 2.0]), combination).contains("[4, 2] in another"));
        assert!(both(&one_layer(3, &[f32::NAN, 2.0]), combination).contains("fc.lora_A"));
    }
}

#[test]
fn only_loras_of_linear_layers_are_combined() {
    let folder = |case: &str| {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft");
        AdapterFile::load_peft(&root.join(case)).expect(case)
    };
    let one = |case: &str, layer: &str| {
        let module = folder(case).into_modules().remove(layer).expect(layer);
        AdapterFile::new(BTreeMap::from([(layer.to_string(), module)]))
    };
    let combine = |file: &AdapterFile, with: usize| {
        let both = [(file, 1.0), (file, 0.5)];
        AdapterFile::combine(&both[..with], Combination::Cat)
    };
    assert!(combine(&one("lora", "body.blocks.0.fc"), 2).is_ok());
    for (case, layer) in [
        ("loha", "body.blocks.0.fc"),
        ("lokr", "body.blocks.0.fc"),
        ("dora", "body.blocks.0.fc"),
        ("lora", "conv"),
        ("lora", "embed"),
    ] {
        let file = one(case, layer);
        for with in [1, 2] {
            let error = combine(&file, with).expect_err("refused").to_string();
            assert_eq!(
                error,
                format!(
                    "`{layer}` is not a plain LoRA of a linear layer (LoHa, LoKr, DoRA, `lora_bias`, convolutions and embeddings cannot be combined); merge the adapters instead"
                )
            );
        }
    }
    assert_eq!(
        combine(&folder("saved"), 2)
            .expect_err("refused")
            .to_string(),
        "`body.norm.bias` is trained in full, which cannot be combined; merge the adapters instead"
    );
    let plain = one("lora", "body.blocks.0.fc");
    let weighted = |weight, rank| {
        let adapters = [(&plain, 1.0), (&plain, weight)];
        AdapterFile::combine(&adapters, Combination::Svd { rank })
            .expect_err("refused")
            .to_string()
    };
    assert_eq!(
        weighted(f64::NAN, None),
        "the weight of an adapter is NaN; it must be finite"
    );
    assert_eq!(
        weighted(1.0, Some(0)),
        "the rank of a combination must be at least 1"
    );
}

#[test]
fn a_lora_bias_has_nowhere_to_go_in_a_layer_without_bias() {
    let device = Device::flex();
    let layer = || {
        let config = burn::nn::LinearConfig::new(4, 3).with_bias(false);
        vec![config.init(&device)]
    };
    let config = LoraConfig {
        r: 2,
        lora_bias: true,
        target_modules: Targets::Pattern("all-linear".into()),
        ..LoraConfig::default()
    };
    let model = layer();
    let plan = Plan::new(&model, config.clone().fresh(1).fast());
    let model = plan
        .expect("PEFT trains it too")
        .apply(model)
        .expect("attached");
    for error in [merge(model.clone()).err(), safe_merge(&model).err()] {
        assert_eq!(
            error.expect("refused").to_string(),
            "an adapter with `lora_bias` cannot be merged: the layer has no `0.bias`"
        );
    }
}

#[test]
fn an_rslora_adapter_alone_combines_to_itself() {
    let (expected, device) = (Expected::new(), Device::flex());
    let config = LoraConfig {
        r: 3,
        use_rslora: true,
        init_lora_weights: InitLoraWeights::Random,
        target_modules: Targets::Pattern("all-linear".into()),
        ..LoraConfig::default()
    };
    let model = expected.model(&device);
    let plan = Plan::new(&model, config.clone().fresh(3).named("rs").fast()).expect("fits");
    let model = add_weighted_adapter(
        plan.apply(model).expect("attached"),
        &[("rs", 1.0)],
        "new",
        Combination::Cat,
    );
    let model = model.expect("combined");
    let (own, new) = (deltas(&model, "rs"), deltas(&model, "new"));
    assert!(
        own.iter()
            .all(|(layer, delta)| distance(&new[layer], delta) < 1e-6)
    );
}

#[test]
fn merged_weights_are_those_of_peft() {
    let (expected, device) = (Expected::new(), Device::flex());
    for case in ["r3+r2_up", "dora", "dora+r3", "r3+dora", "with_bias+r3"] {
        let names: Vec<&str> = case.split('+').collect();
        let model = expected.with(&names, &device);
        expected.assert_near(
            &format!("forward.{case}"),
            &values(model.fast(expected.x(&device))),
        );
        let merged = safe_merge(&model).expect("finite");
        expected.assert_near(
            &format!("forward.{case}"),
            &values(merged.fast(expected.x(&device))),
        );
        assert!(adapter_names(&merged).is_empty() && !adapter_names(&model).is_empty());
        if case == "r3+dora" {
            // PEFT's merged weights are not those of its forward pass here: see `merge`.
            let other = expected.read("forward_merged.r3+dora").to_f32();
            let own = expected.read("forward.r3+dora").to_f32();
            assert!(distance(&other, &own) > 0.1);
            continue;
        }
        for (name, layer) in [("up", &merged.up), ("down", &merged.down)] {
            let key = |part: &str| format!("merged.{case}.{name}.{part}");
            expected.assert_near(&key("weight"), &transposed(layer.weight.val()));
            let bias = layer.bias.as_ref().expect("has a bias").val();
            expected.assert_near(&key("bias"), &values(bias));
        }
    }
}

#[test]
fn merging_what_is_not_finite_is_refused_and_changes_nothing() {
    let (expected, device) = (Expected::new(), Device::flex());
    let mut modules = file("r3").into_modules();
    let down = modules.get_mut("down").expect("adapted");
    down.factors = Factors::lora(
        HostTensor::from_f32([3, 24], &[3e38; 72]),
        HostTensor::from_f32([12, 3], &[3e38; 36]),
    );
    let model = expected.model(&device);
    let plan = Plan::new(
        &model,
        AdapterFile::new(modules).stored().named("huge").fast(),
    )
    .expect("finite factors");
    let model = plan.apply(model).expect("attached");
    let error = safe_merge(&model).expect_err("infinite").to_string();
    assert!(
        error.starts_with("tensor `down.weight` holds a value that is not finite"),
        "{error}"
    );
    assert_eq!(adapter_names(&model), ["huge"]);
    assert_eq!(
        values(detach(model).down.weight.val()),
        values(expected.model(&device).down.weight.val())
    );
}
