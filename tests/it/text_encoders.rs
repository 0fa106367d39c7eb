//! Text encoders that are trained with the transformer.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use burn::tensor::{Device, Tensor};
use flux_lora::backward::{MicroBatch, loss_and_gradients};
use flux_lora::loss::Penalty;
use flux_lora::run::adapter::{NewAdapters, attach_all};
use flux_lora_tests::{Workbench, program, root, tensors};
use flux_model::family::{Condition, Family};
use flux_model::flux1::Flux1;
use flux_model::lora::Component;
use flux_model::pipeline::PipelineFolder;
use flux_model::prompted::{Prompted, PromptedInput, Prompts};
use flux_model::weights::Base;
use lora_core::files::host::HostTensor;
use lora_core::files::safetensors::TensorFile;
use lora_core::peft::load_together;
use lora_core::state::host_tensor;
use lora_core::training::recompute::Recomputed;

/// `||a - b|| / ||b||`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().copied().map(square).sum::<f64>()).sqrt()
}

/// The loss and the gradients of `tests/reference/text_encoder_training.py`, where so much is computed again.
fn gradients(recomputed: Recomputed) -> (f32, BTreeMap<String, Vec<f32>>) {
    let folder = root().join("tests/fixtures/text_encoder_training");
    let given = TensorFile::open(&folder.join("expected.safetensors")).unwrap();
    let device = Device::flex().autodiff();
    let pipeline = root().join("tests/fixtures/parity/pipeline_dev/model");
    let family = Flux1::open(PipelineFolder::open(&pipeline).unwrap()).unwrap();
    let encoders = [Component::ClipL, Component::T5];
    let model = Prompted::<Flux1> {
        network: family.network(Base::default(), &device).unwrap(),
        text: Some(family.text_modules(&encoders, false, &device).unwrap()),
    };
    let prefixes = ["transformer.", "text_encoder.", "text_encoder_2."];
    let mut files = load_together(&folder.join("init.safetensors"), &prefixes).unwrap();
    let adapters: NewAdapters = Component::ALL
        .map(|component| {
            let file = files.remove(format!("{component}.").as_str()).unwrap();
            (component, file.stored().fast())
        })
        .into();
    let model = attach_all(model, &adapters).unwrap();

    let tensor = |name: &str| {
        let tensor = given.read(name).unwrap();
        let shape = tensor.shape.clone();
        Tensor::<3>::from_data(
            burn::tensor::TensorData::new(tensor.to_f32(), shape),
            &device,
        )
    };
    let numbers = |name: &str| given.read(name).unwrap().to_f32();
    let tokenizer = family.tokenizer().unwrap();
    let tokens = ["a photo of pattern 0", ""].map(|prompt| tokenizer(prompt, 16).unwrap());
    let prompts = Prompts {
        encoded: Vec::new(), // every encoder is trained
        tokens: tokens.to_vec(),
    };
    let text = model.text(&prompts, &device).unwrap();
    let near = |found: HostTensor, name: &str| {
        let error = distance(&found.to_f32(), &numbers(name));
        assert!(error < 1e-5, "{name}: {error:e}");
    };
    near(host_tensor(text.sequence), "sequence");
    near(host_tensor(text.pooled), "pooled");

    let batch = MicroBatch {
        input: PromptedInput {
            tokens: tensor("tokens"),
            grid: [8, 6],
            prompts,
            sigma: numbers("sigma"),
            guidance: numbers("guidance"),
            condition: Condition::default(),
        },
        target: tensor("target"),
        weights: vec![1.0; 2],
        penalty: Penalty::Square,
    };
    let (loss, found) = loss_and_gradients(&model, batch, 1, recomputed).unwrap();
    let found = found.iter().map(|(path, gradient)| {
        let (layer, factor) = path.split_once(".weight.adapter.default.").unwrap();
        let prefix = match layer.starts_with("text_encoder") {
            true => "",
            false => "transformer.",
        };
        let name = format!("grad.{prefix}{layer}.{factor}.weight");
        (name, host_tensor(gradient.clone()).to_f32())
    });
    (loss, found.collect())
}

#[test]
fn gradients_flow_into_the_text_encoders_as_in_torch() {
    let folder = root().join("tests/fixtures/text_encoder_training");
    let expected = TensorFile::open(&folder.join("expected.safetensors")).unwrap();
    let (loss, found) = gradients(Recomputed::first(usize::MAX));
    let of_torch = expected.read("loss").unwrap().to_f32()[0];
    assert!(
        (loss - of_torch).abs() < 1e-5 * of_torch,
        "{loss}, torch {of_torch}"
    );
    let names: Vec<&str> = expected
        .names()
        .filter(|name| name.starts_with("grad."))
        .collect();
    assert_eq!(names, found.keys().collect::<Vec<_>>());
    let mut worst = 0.0_f64;
    for name in names {
        let error = distance(&found[name], &expected.read(name).unwrap().to_f32());
        assert!(error < 1e-4, "{name}: {error:e}");
        worst = worst.max(error);
    }
    println!(
        "{} gradients, at most {worst:.1e} from torch's",
        found.len()
    );
    // The same bits, whatever is computed again.
    for (blocks, with_results) in [(0, 0), (2, 0), (2, 1), (usize::MAX, usize::MAX)] {
        let recomputed = Recomputed {
            blocks,
            with_results,
        };
        let again = gradients(recomputed);
        assert_eq!(again, (loss, found.clone()), "{recomputed:?}");
    }
}

/// Both text encoders, at a rate of their own, for two steps without dropout or clipping.
const BOTH: [&str; 8] = [
    "--set=lora.text_encoder.r=3",
    "--set=lora.text_encoder_2.target_modules=[\"q\", \"wo\"]",
    "--set=lora.lora_alpha=4",
    "--set=lora.lora_dropout=0",
    "--set=optimizer.max_grad_norm=none",
    "--set=lr_scheduler.name=constant",
    "--set=lr_scheduler.warmup_steps=0",
    "--set=train.steps=2",
];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&BOTH, more].concat()
}

/// The tensors of one network.
fn of<'a>(all: &'a BTreeMap<String, Vec<f32>>, prefix: &str) -> BTreeMap<&'a str, &'a [f32]> {
    let own = all.iter().filter(|(name, _)| name.starts_with(prefix));
    own.map(|(name, values)| (name.as_str(), values.as_slice()))
        .collect()
}

fn first_loss(bench: &Workbench, run: &str) -> f64 {
    let metrics = std::fs::read_to_string(bench.path(run).join("metrics.jsonl")).unwrap();
    let line: serde_json::Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    line["loss"].as_f64().unwrap()
}

#[test]
fn a_rate_of_their_own_moves_the_text_encoders_alone() {
    let bench = Workbench::new();
    bench.train_ok("none", "flex", &BOTH[2..]);
    bench.train_ok("both", "flex", &with(&[]));
    bench.train_ok(
        "faster",
        "flex",
        &with(&["--set=optimizer.text_encoder_lr=1e-2"]),
    );
    let after = |run: &str| tensors(&bench.path(run).join("ckpt-0000000001/lora.safetensors"));
    let (none, both, faster) = (after("none"), after("both"), after("faster"));
    // Nothing is different before the first step, and the transformer not after it.
    let losses = ["none", "both", "faster"].map(|run| first_loss(&bench, run));
    assert!((losses[0] - losses[1]).abs() < 1e-5, "{losses:?}");
    assert_eq!(losses[1], losses[2]);
    assert_eq!(of(&both, "transformer."), of(&faster, "transformer."));
    for prefix in ["text_encoder.", "text_encoder_2."] {
        assert!(of(&none, prefix).is_empty());
        let (slow, fast) = (of(&both, prefix), of(&faster, prefix));
        let up = slow.keys().filter(|name| name.ends_with("lora_B.weight"));
        assert_eq!(2 * up.clone().count(), slow.len());
        for name in up {
            // Adam's first step is the rate, whatever the gradient is.
            let largest = |values: &[f32]| values.iter().fold(0_f32, |m, v| m.max(v.abs()));
            let (slow, fast) = (largest(slow[name]), largest(fast[name]));
            assert!((slow / 2e-3 - 1.0).abs() < 1e-2, "{name}: {slow}");
            assert!((fast / 1e-2 - 1.0).abs() < 1e-2, "{name}: {fast}");
        }
    }
    // CLIP by its attention, T5 by what was named.
    let layers = |prefix: &str, end: &str| {
        let all = of(&both, prefix);
        all.keys()
            .filter(|name| name.ends_with(&format!("{end}.lora_A.weight")))
            .count()
    };
    assert!(layers("text_encoder.", ".out_proj") > 0 && layers("text_encoder_2.", ".wo") > 0);
    assert_eq!(
        layers("text_encoder.", ".fc1") + layers("text_encoder_2.", ".k"),
        0
    );
}

#[test]
fn captions_are_cached_while_an_encoder_stays_as_it_is() {
    let bench = Workbench::new();
    let cached = |run: &str, args: &[&str]| {
        let mut command = Command::new(program());
        command
            .arg("cache")
            .arg(bench.path("run.toml"))
            .arg("--output")
            .arg(bench.path(run));
        let out = command.args(args).output().unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        let files = std::fs::read_dir(bench.path(run).join("cache")).unwrap();
        let texts = files.filter(|file| {
            let name = file.as_ref().unwrap().file_name();
            name.to_string_lossy().starts_with("text-")
        });
        texts.count()
    };
    // Five captions and the empty one.
    assert_eq!(cached("one", &["--set=lora.text_encoder.r=4"]), 6);
    assert_eq!(cached("both", &with(&[])), 0);
}

#[test]
fn a_lora_with_text_encoders_is_shown_exported_and_continued() {
    let bench = Workbench::new();
    let sample = [
        "--set=sample.prompts=[\"a photo of pattern 3\"]",
        "--set=sample.every=2",
        "--set=sample.height=64",
        "--set=sample.width=64",
        "--set=sample.num_inference_steps=2",
        "--set=sample.seed=5",
        "--set=optimizer.text_encoder_lr=0.1",
        "--set=export.formats=[\"kohya\", \"peft\", \"comfyui\"]",
    ];
    bench.train_ok("run", "flex", &with(&sample));
    let run = bench.path("run");

    // The program that reads the finished file makes the same picture, and another without the text encoders.
    let picture = |lora: &Path| {
        let out = bench.path("out.png");
        let mut command = Command::new(program());
        command.arg("sample").arg("--model");
        command.arg(root().join("tests/fixtures/parity/pipeline_dev/model"));
        command.args([
            "--prompt",
            "a photo of pattern 3",
            "--seed",
            "5",
            "--steps",
            "2",
        ]);
        command.args([
            "--height",
            "64",
            "--width",
            "64",
            "--max-sequence-length",
            "16",
        ]);
        command.arg("--lora").arg(lora).arg("--out").arg(&out);
        command.args(["--overwrite", "--guidance", "3.5", "--device", "flex"]);
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        image::open(out).unwrap().to_rgb8()
    };
    let largest_difference = |a: &image::RgbImage, b: &image::RgbImage| {
        let pairs = a.as_raw().iter().zip(b.as_raw());
        pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap()
    };
    let preview = image::open(run.join("samples/step-0000002-0.png"))
        .unwrap()
        .to_rgb8();
    let shown = picture(&run.join("lora.safetensors"));
    assert!(largest_difference(&preview, &shown) <= 1);
    let file = TensorFile::open(&run.join("lora.safetensors")).unwrap();
    let network = file.names().filter(|name| name.starts_with("transformer."));
    let network = network
        .map(|name| (name.to_string(), file.read(name).unwrap()))
        .collect();
    let alone = bench.path("alone.safetensors");
    let bytes = lora_core::files::safetensors::serialize(&network, &BTreeMap::new());
    std::fs::write(&alone, bytes).unwrap();
    assert!(largest_difference(&preview, &picture(&alone)) > 1);

    // Every form has them under the names of its program.
    let names = |path: &str| -> Vec<String> {
        let file = TensorFile::open(&run.join(path)).unwrap();
        file.names().map(String::from).collect()
    };
    let has = |names: Vec<String>, start: &str| {
        assert!(
            names.iter().any(|name| name.starts_with(start)),
            "{start}: {names:?}"
        );
    };
    let kohya = || names("lora-kohya.safetensors");
    has(
        kohya(),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.",
    );
    has(kohya(), "lora_te3_encoder_block_0_layer_0_SelfAttention_q.");
    has(
        names("lora-comfyui.safetensors"),
        "text_encoders.clip_l.transformer.text_model.",
    );
    has(
        names("lora-comfyui.safetensors"),
        "text_encoders.t5xxl.transformer.encoder.",
    );
    let peft = |folder: &str| names(&format!("lora-peft/{folder}/adapter_model.safetensors"));
    has(peft("text_encoder"), "base_model.model.text_model.");
    has(peft("text_encoder_2"), "base_model.model.encoder.");

    // A run from that file begins where the other ended.
    let from = format!(
        "--set=lora.init_from={}",
        run.join("lora.safetensors").display()
    );
    let still = [
        from.as_str(),
        "--set=optimizer.learning_rate=1e-30",
        "--set=train.steps=1",
    ];
    bench.train_ok("again", "flex", &with(&still));
    let ended = tensors(&run.join("ckpt-0000000002/lora.safetensors"));
    let begun = tensors(&bench.path("again/ckpt-0000000001/lora.safetensors"));
    assert_eq!(
        ended.keys().collect::<Vec<_>>(),
        begun.keys().collect::<Vec<_>>()
    );
    for (name, values) in &ended {
        assert!(distance(&begun[name], values) < 1e-6, "{name}");
    }
}

#[test]
fn what_cannot_be_trained_is_refused_in_words() {
    let bench = Workbench::new();
    let refused = |args: &[&str], words: &str| {
        let out = bench.train("refused", "flex", args);
        let said = String::from_utf8_lossy(&out.stderr).to_string();
        assert!(
            !out.status.success() && said.contains(words),
            "{args:?}: {said}"
        );
        assert!(!bench.path("refused").exists());
    };
    let clip = "--set=lora.text_encoder.r=4";
    refused(
        &[
            clip,
            "--set=lora.lora_dropout=0",
            "--set=lora.peft_type=LOHA",
        ],
        "no program loads such an adapter of a text encoder",
    );
    refused(
        &["--set=optimizer.text_encoder_lr=1e-4"],
        "add `[lora.text_encoder]`",
    );
    refused(&["--set=lora.text_encoder.rank=4"], "lora.text_encoder");
    let named = "--set=lora.text_encoder_2.target_modules=[\"q_proj\"]";
    refused(&[named], "`lora.text_encoder_2`");
    let klein = root().join("tests/fixtures/parity/flux2_pipeline_distilled/model");
    let klein = format!("--set=model.path={}", klein.display());
    refused(
        &[clip, &klein],
        "`lora.text_encoder`: the text encoder of FLUX.2 cannot be trained",
    );
}
