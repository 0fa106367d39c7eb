//! What must not happen in silence: an adapter on the wrong model, on another library's, on a layer nobody knows; a step
//! that half happens.

use std::collections::BTreeMap;

use burn::module::{Lora as BurnLora, Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, LinearLayout};
use burn::optim::{AdafactorConfig, AdamWConfig, SgdConfig, momentum::MomentumConfig};
use burn::tensor::{Device, Tensor};

use crate::attach::{DEFAULT_ADAPTER, Plan};
use crate::edit::adapter_names;
use crate::peft::{InitLoraWeights, PeftType, Targets};
use crate::state::{adapter_state, check_finite, count_parameters, trainable_parameters};
use crate::test_model::{Mlp, input, values};
use crate::training::OptimizerState;
use crate::training::optimizers::UpdateRule;
use crate::*;

fn config(target: &str) -> LoraConfig {
    LoraConfig {
        r: 2,
        target_modules: Targets::List(vec![target.into()]),
        init_lora_weights: InitLoraWeights::Random,
        ..LoraConfig::default()
    }
}

fn autodiff() -> Device {
    Device::flex().autodiff()
}

pub(crate) fn adapted() -> Mlp {
    attach(Mlp::new(8, &autodiff()), config("up").fresh(1)).expect("fits")
}

#[test]
fn a_plan_for_another_model_is_an_error() {
    let plan = || Plan::new(&Mlp::new(8, &autodiff()), config("up").fresh(1)).expect("fits");
    let other = LinearConfig::new(8, 24).init(&autodiff());
    let error = plan()
        .apply(other.clone())
        .expect_err("not the planned model");
    assert!(
        error.to_string().contains("`up.weight` is not there"),
        "{error}"
    );
    assert_eq!(trainable_parameters(&other).len(), 0, "lazy");
    let wider = Mlp::new(10, &autodiff());
    let error = plan().apply(wider).expect_err("another size").to_string();
    assert!(error.contains("planned for another model"), "{error}");
    let error = plan().apply(adapted()).expect_err("taken").to_string();
    assert!(error.contains("`default` is already attached"), "{error}");
}

#[test]
fn what_another_library_put_there_is_named_and_not_counted() {
    let model = Mlp::new(8, &autodiff()).apply_lora(BurnLora::new(2, 4.0));
    assert!(adapter_state(&model).is_empty());
    assert!(adapter_names(&model).is_empty());
    assert_eq!(count_parameters(&model).adapted_layers, 0);
    let error = attach(model, config("up").fresh(1)).expect_err("taken");
    assert_eq!(
        error.to_string(),
        "`up.weight` carries a reparameterization named `lora` that is not lora-core's; remove or materialize it first"
    );
}

/// Names that this library has used for its own containers, and `adapter` as the name of a field.
#[derive(Module, Debug)]
struct Adapter {
    adapter: Lora,
}

#[derive(Module, Debug)]
struct Lora {
    default: Inner,
}

#[derive(Module, Debug)]
struct Inner {
    lora_a: Linear,
    lora_b: Linear,
}

#[test]
fn names_in_a_model_confuse_nobody() {
    let linear = || LinearConfig::new(4, 4).with_bias(false).init(&autodiff());
    let (lora_a, lora_b) = (linear(), linear());
    let default = Inner { lora_a, lora_b };
    let model = Adapter {
        adapter: Lora { default },
    };
    assert!(adapter_names(&model).is_empty());
    assert!(adapter_state(&model).is_empty());
    assert_eq!(count_parameters(&model).adapted_layers, 0);
    let error = set_adapters(model.clone(), &[("default", 1.0)]);
    assert!(error.is_err(), "there is no such adapter");
    let model = attach(model, config("lora_a").fresh(1)).expect("fits");
    assert_eq!(adapter_names(&model), ["default"]);
    let trainable: Vec<String> = trainable_parameters(&model).into_keys().collect();
    let factor = |part: &str| format!("adapter.default.lora_a.weight.adapter.default.{part}");
    assert_eq!(trainable, [factor("lora_A"), factor("lora_B")]);
    assert_eq!(count_parameters(&model).adapted_layers, 1);
}

#[derive(Module, Debug)]
struct OwnLayers {
    known: Linear,
    table: Embedding,
    own: Projection,
}

/// `[out, in]`, as nobody could know.
#[derive(Module, Debug)]
struct Projection {
    weight: Param<Tensor<2>>,
}

#[test]
fn only_layers_whose_weight_can_be_read_are_adapted() {
    let device = autodiff();
    let model = OwnLayers {
        known: LinearConfig::new(4, 6).init(&device),
        table: EmbeddingConfig::new(5, 4).init(&device),
        own: Projection {
            weight: Param::from_tensor(Tensor::zeros([6, 4], &device)),
        },
    };
    let error = attach(model.clone(), config("own").fresh(1)).expect_err("unknown");
    assert_eq!(
        error.to_string(),
        "`own`, named by `own` of `target_modules`, cannot be adapted: it belongs to a `Projection` and has shape [6, 4]; only a Linear, an Embedding or a convolution of burn-nn can be adapted"
    );
    let everything = LoraConfig {
        target_modules: Targets::Pattern(".*".into()),
        ..config("")
    };
    let plan = Plan::new(&model, everything.fresh(1)).expect("two layers");
    assert_eq!(plan.layers().collect::<Vec<_>>(), ["known", "table"]);
}

#[test]
fn a_plan_tells_what_it_would_attach_and_makes_no_weight() {
    let model = OwnLayers {
        known: LinearConfig::new(4, 6).init(&autodiff()),
        table: EmbeddingConfig::new(5, 4).init(&autodiff()),
        own: Projection {
            weight: Param::from_tensor(Tensor::zeros([6, 4], &autodiff())),
        },
    };
    let plan = Plan::new(&model, config("known").fresh(1)).expect("fits");
    assert_eq!(plan.file(None).numel(), 2 * (4 + 6));
    assert!(!model.known.weight.is_initialized(), "lazy");

    let whole = LoraConfig {
        modules_to_save: vec!["table".into()],
        ..config("known")
    };
    let dora = LoraConfig {
        use_dora: true,
        ..config("known")
    };
    let of_kind = |peft_type| LoraConfig {
        peft_type,
        ..config("known")
    };
    let (loha, lokr) = (of_kind(PeftType::Loha), of_kind(PeftType::Lokr));
    for config in [config("known"), config("table"), dora, loha, lokr, whole] {
        let plan = Plan::new(&model, config.clone().fresh(1)).expect("fits");
        let told = plan.file(Some(&config));
        let attached = plan.apply(model.clone()).expect("fits");
        let file = AdapterFile::from_model(&attached, DEFAULT_ADAPTER, Some(&config));
        assert_eq!(told, file.expect("attached"), "{config:?}");
        assert_eq!(told.numel(), count_parameters(&attached).trainable);
    }
}

#[test]
fn a_lazy_weight_in_column_layout_is_adapted_in_its_real_shape() {
    let made = |layout| {
        LinearConfig::new(6, 10)
            .with_layout(layout)
            .init(&autodiff())
    };
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        let model = vec![made(layout)];
        let model = attach(model, config("0").fresh(1).fast()).expect("fits");
        let x = Tensor::<2>::ones([3, 6], &autodiff());
        let dense = values(model[0].forward(x.clone()));
        let fast = values(linear(&model[0], x));
        assert_eq!(dense.len(), 30);
        let close = dense.iter().zip(&fast).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(close, "{dense:?} {fast:?}");
    }
}

#[test]
fn decompositions_that_would_never_end_are_refused() {
    let model = vec![LinearConfig::new(1025, 1025).init(&Device::flex())];
    let config = |init| LoraConfig {
        init_lora_weights: init,
        ..config("0")
    };
    let error = Plan::new(&model, config(InitLoraWeights::Pissa).fresh(1)).expect_err("too large");
    assert!(error.to_string().contains("use `pissa_niter_4`"), "{error}");
    let error =
        Plan::new(&model, config(InitLoraWeights::PissaNiter(101)).fresh(1)).expect_err("too many");
    assert_eq!(
        error.to_string(),
        "`init_lora_weights` pissa_niter_101 asks for 101 rounds; 4 to 32 are usual, 100 are the most"
    );
}

pub(crate) fn gradients(model: &Mlp) -> Gradients {
    let loss = model
        .fast(input(5, 8, &Device::flex()).autodiff())
        .square()
        .sum();
    let mut gradients = Gradients::default();
    gradients.take("", model, &mut loss.backward());
    gradients
}

#[test]
fn a_step_that_is_refused_changes_nothing() {
    let (mut model, mut optimizer) = (adapted(), PathOptimizer::new(AdamWConfig::new().build()));
    let first = gradients(&model);
    optimizer.step(1e-2, &mut model, first).expect("complete");
    let before = (adapter_state(&model), optimizer.state().tensors);
    // One gradient too few, and then those of a model with one more parameter.
    let mut few = gradients(&model);
    few.remove("up.weight.adapter.default.lora_B");
    let larger = attach(model.clone(), config("down").fresh(2).named("b").fast()).expect("fits");
    for (gradients, problem) in [
        (few, "`up.weight.adapter.default.lora_B` has no gradient"),
        (
            gradients(&larger),
            "the gradient of `down.weight.adapter.b.lora_A` has no parameter",
        ),
    ] {
        let error = optimizer
            .step(1e-2, &mut model, gradients)
            .expect_err("refused")
            .to_string();
        assert!(error.contains(problem), "{error}");
        assert_eq!((adapter_state(&model), optimizer.state().tensors), before);
    }
}

/// Four steps, saved after two: as if it had never stopped.
fn resumes<R: Into<UpdateRule>>(optimizer: impl Fn() -> R, tensors: usize) {
    let (mut model, mut straight) = (adapted(), PathOptimizer::new(optimizer()));
    let step = |model: &mut Mlp, optimizer: &mut PathOptimizer| {
        let found = gradients(model);
        optimizer.step(1e-2, model, found).expect("complete");
    };
    (0..2).for_each(|_| step(&mut model, &mut straight));
    let state = straight.state();
    assert_eq!(state.tensors.len(), tensors);
    let (bytes, mut written) = (state.to_bytes(), Vec::new());
    state.write(&mut written).expect("in memory");
    assert_eq!(written, bytes);
    let stored = || {
        OptimizerState::from_bytes("o".as_ref(), bytes.clone(), state.scalars.clone())
            .expect("ours")
    };
    let trainable = trainable_parameters(&model);
    let restore = |state| PathOptimizer::restore(optimizer(), state, &trainable, &Device::flex());
    let mut resumed_model = model.clone();
    let mut resumed = restore(stored()).expect("complete");
    for _ in 0..2 {
        step(&mut model, &mut straight);
        step(&mut resumed_model, &mut resumed);
    }
    assert_eq!(adapter_state(&model), adapter_state(&resumed_model));
    assert_eq!(straight.state().tensors, resumed.state().tensors);
    if let Some(name) = stored().tensors.keys().next() {
        let refused = |change: &dyn Fn(&mut BTreeMap<String, files::host::HostTensor>)| {
            let mut state = stored();
            change(&mut state.tensors);
            restore(state).expect_err("refused").to_string()
        };
        let error = refused(&|tensors| drop(tensors.remove(name)));
        assert!(error.contains(&format!("`{name}` is missing")), "{error}");
        let error = refused(&|tensors| {
            let odd = files::host::HostTensor::from_f32([7, 1], &[0.0; 7]);
            tensors.insert(name.clone(), odd);
        });
        assert!(
            error.contains(&format!("`{name}` has shape [7, 1]")),
            "{error}"
        );
        let error = refused(&|tensors| {
            let more = tensors[name].clone();
            tensors.insert("up.weight.adapter.default.lora_A.more".into(), more);
        });
        assert!(
            error.contains("is not part of this optimizer's state"),
            "{error}"
        );
    }
}

#[test]
fn any_optimizer_resumes_and_its_state_is_checked() {
    resumes(|| AdamWConfig::new().build(), 4);
    resumes(|| AdafactorConfig::new().build(), 4);
    resumes(
        || {
            SgdConfig::new()
                .with_momentum(Some(MomentumConfig::new()))
                .build()
        },
        2,
    );
    resumes(|| SgdConfig::new().build(), 0);
}

#[test]
fn a_value_that_is_not_finite_is_named() {
    let (mut model, mut optimizer) = (adapted(), PathOptimizer::new(SgdConfig::new().build()));
    check_finite(&model).expect("finite");
    let found = gradients(&model);
    optimizer
        .step(f64::INFINITY, &mut model, found)
        .expect("complete");
    let error = check_finite(&model).expect_err("infinite").to_string();
    assert!(
        error.contains("`up.weight.adapter.default.lora_A` holds a value that is not finite"),
        "{error}"
    );
}

#[test]
fn the_norm_is_summed_in_f64_by_path() {
    let model = adapted();
    let found = gradients(&model);
    let sums = found.iter().map(|(_, gradient)| {
        let values = values(gradient.clone()).into_iter();
        values.map(|v| f64::from(v) * f64::from(v)).sum::<f64>()
    });
    assert_eq!(found.norm().expect("finite"), sums.sum::<f64>().sqrt());
    assert_eq!(Gradients::default().norm().expect("nothing"), 0.0);
}
