//! Runs that train other adapters than LoRA, or start LoRA as a part of the base weights.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use burn::tensor::{Device, Tensor, TensorData};
use flux_lora::adapters::{LoadedLora, attach};
use flux_lora_tests::{CONFIG, Workbench, copy, program, root};
use flux_model::family::Velocity;
use flux_model::flux1::config::FluxConfig;
use flux_model::flux1::latent::{image_positions, text_positions};
use flux_model::flux1::transformer::{FluxInput, FluxTransformer};
use flux_model::lora::{Component, ModelShape, delta, read};
use flux_model::network_config::NetworkConfig;
use flux_model::weights::Base;
use lora_core::AdapterFile;
use lora_core::files::safetensors::TensorFile;
use lora_core::peft::PeftType;
use lora_core::random::Stream;

/// The workbench's run, 8 steps of another kind; `lora_dropout` is LoRA's alone.
fn bench(kind: &str) -> Workbench {
    let bench = Workbench::new();
    let section = format!(
        "peft_type = \"{kind}\"\ntarget_modules = [\"attn.to_q\", \"attn.to_out.0\", \"ff.net.2\", \"proj_mlp\"]\n"
    );
    let config = CONFIG
        .replace("lora_dropout = 0.1\n", &section)
        .replace("steps = 40", "steps = 8");
    bench.write_config(&(config + "\n[export]\nformats = [\"comfyui\", \"peft\"]\n"));
    bench
}

#[test]
fn a_format_that_cannot_hold_an_adapter_is_refused_before_it_is_written() {
    let bench = bench("LOKR");
    bench.train_ok("run", "flex", &[]);
    let export = |to: &str, more: &[&str]| {
        let mut command = Command::new(program());
        command.arg("export").arg(bench.path("run"));
        command.arg("--out").arg(bench.path("out")).args(more);
        if !to.is_empty() {
            command.args(["--to", to]);
        }
        let out = command.output().unwrap();
        let said = [out.stderr, out.stdout].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        (out.status.code(), said)
    };
    let files = || {
        let entries = fs::read_dir(bench.path("out")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<BTreeSet<_>>()
    };
    // ComfyUI's file comes first and would be there alone.
    let (code, said) = export("comfyui,kohya", &[]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("kohya cannot hold"), "{said}");
    assert!(!bench.path("out").exists(), "half a folder");

    let (code, said) = export("all", &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("left out: kohya cannot hold"), "{said}");
    let written = ["README.md", "run-comfyui.safetensors"];
    assert_eq!(files(), BTreeSet::from(written.map(String::from)));

    fs::write(bench.path("out/README.md"), "mine").unwrap();
    let (code, said) = export("comfyui,kohya", &["--overwrite"]);
    assert_eq!(code, Some(1), "{said}");
    assert_eq!(files(), BTreeSet::from(written.map(String::from)));
    let readme = fs::read_to_string(bench.path("out/README.md")).unwrap();
    assert_eq!(readme, "mine", "as it was");

    // Nothing is named: what can hold it, which of a LoKr is not what is usual.
    fs::remove_dir_all(bench.path("out")).unwrap();
    let (code, said) = export("", &[]);
    assert_eq!(code, Some(0), "{said}");
    for format in ["diffusers", "peft", "kohya"] {
        let left_out = format!("left out: {format} cannot hold");
        assert!(said.contains(&left_out), "{left_out}: {said}");
    }
    assert_eq!(files(), BTreeSet::from(written.map(String::from)));
    let readme = fs::read_to_string(bench.path("out/README.md")).unwrap();
    assert!(
        readme.contains("--lora run-comfyui.safetensors"),
        "{readme}"
    );
    assert!(!readme.contains("**diffusers**"), "{readme}");
}

#[test]
fn loha_and_lokr_resume_exactly_and_every_export_means_the_same() {
    for (kind, peft_type) in [("LOKR", PeftType::Lokr), ("LOHA", PeftType::Loha)] {
        let bench = bench(kind);
        bench.train_ok("straight", "flex", &[]);
        let expected = bench.result("straight");
        for step in [1, 5] {
            let run = format!("resumed-{step}");
            let checkpoint = format!("ckpt-{step:010}");
            bench.copy_run("straight", &run, |name| {
                name == "cache" || name == "metrics.jsonl" || name == checkpoint
            });
            bench.train_ok(&run, "flex", &["--resume"]);
            bench
                .result(&run)
                .assert_same(&expected, &format!("{kind}, resumed after step {step}"));
        }

        let folder = bench.path("straight/lora-peft");
        let trained = AdapterFile::load_peft(&folder).expect("a PEFT folder");
        assert_eq!(trained.peft_type(), peft_type);
        let path = bench.path("straight/ckpt-0000000008/lora.safetensors");
        let saved = AdapterFile::load(&path, "transformer.").expect("a checkpoint");
        assert!(
            saved.fold_scale().modules() == trained.modules(),
            "{kind}: the folder is not what was trained"
        );

        // alpha / r = 7 / 4 is in the factors of every file, however the readers scale.
        let set = |file: &str| {
            let path = bench.path(&format!("straight/{file}"));
            read(&path, &ModelShape::default()).unwrap_or_else(|error| panic!("{file}: {error}"))
        };
        let reference = set("lora-peft");
        assert_eq!(reference.transformer.len(), trained.modules().len());
        for file in ["lora.safetensors", "lora-comfyui.safetensors"] {
            let found = set(file);
            // Where query, key and value are one layer, those that were not trained are there with no change.
            for (module, update) in &found.transformer {
                let is_zero = || {
                    delta(update, None)
                        .expect("readable")
                        .iter()
                        .all(|v| *v == 0.0)
                };
                assert!(
                    reference.transformer.contains_key(module) || is_zero(),
                    "{file} changes {module}"
                );
            }
            for (module, update) in &reference.transformer {
                let expected = delta(update, None).expect("readable");
                let found = delta(&found.transformer[module], None).expect("readable");
                let largest = expected.iter().fold(0f32, |max, v| max.max(v.abs()));
                assert!(largest > 0.0, "{module} was trained");
                for (a, b) in found.iter().zip(&expected) {
                    assert!(
                        (a - b).abs() <= 1e-5 * largest,
                        "{file} {module}: {a} != {b}"
                    );
                }
            }
        }
    }
}

/// The workbench's network, which no run writes to.
fn base() -> FluxTransformer {
    let path = root().join("tests/fixtures/parity/pipeline_dev/model/transformer");
    FluxConfig::load(&path, None, Base::default(), &Device::flex()).expect("the fixture")
}

fn with(file: AdapterFile) -> FluxTransformer {
    lora_core::attach(base(), file.stored().fast()).expect("fits")
}

/// What the network makes of one fixed input.
fn output(model: &FluxTransformer) -> Vec<f32> {
    let mut stream = Stream::new(1, "test", 0, 0);
    let mut values = |shape: &[usize]| {
        let values = stream.normals(shape.iter().product());
        TensorData::new(values, shape)
    };
    let device = Device::flex();
    let input = FluxInput {
        img: Tensor::from_data(values(&[1, 16, 64]), &device),
        txt: Tensor::from_data(values(&[1, 6, 40]), &device),
        pooled: Tensor::from_data(values(&[1, 24]), &device),
        sigma: vec![0.4],
        guidance: vec![3.5],
        positions: [text_positions(6), image_positions(8, 8)].concat(),
        reference_tokens: 0,
    };
    let output = model.forward(input).expect("resident").into_data();
    output.try_into_vec().expect("f32")
}

/// The largest difference by the largest value.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0f32, |m, v| m.max(v.abs()));
    largest(&mut a.iter().zip(b).map(|(a, b)| a - b)) / largest(&mut b.iter().copied())
}

#[test]
fn factors_split_off_the_base_resume_exactly_and_are_exported_as_plain_loras() {
    let untouched = output(&base());
    for (init, splits) in [
        ("pissa_niter_4", true),
        ("pissa", true),
        ("olora", true),
        ("orthogonal", false),
    ] {
        let bench = Workbench::new();
        let config = CONFIG
            .replace(
                "[lora]\n",
                &format!("[lora]\ninit_lora_weights = \"{init}\"\n"),
            )
            .replace("steps = 40", "steps = 8");
        bench
            .write_config(&(config + "\n[export]\nformats = [\"comfyui\", \"kohya\", \"peft\"]\n"));
        bench.train_ok("straight", "flex", &[]);
        bench.copy_run("straight", "resumed", |name| {
            name == "cache" || name == "metrics.jsonl" || name == "ckpt-0000000005"
        });
        bench.train_ok("resumed", "flex", &["--resume"]);
        let expected = bench.result("straight");
        bench.result("resumed").assert_same(&expected, init);

        let saved = |step: &str| {
            let path = bench.path(&format!("straight/ckpt-000000000{step}/lora.safetensors"));
            AdapterFile::load(&path, "transformer.").expect("a checkpoint")
        };
        let mut modules = saved("8").into_modules().into_values();
        assert!(modules.all(|module| module.split.is_some() == splits));
        // The first step has a learning rate of a few 1e-4: the network is nearly the one it was split from.
        let first = difference(&output(&with(saved("1"))), &untouched);
        let trained = output(&with(saved("8")));
        let last = difference(&trained, &untouched);
        assert!(first < 0.2 * last && last > 1e-2, "{init}: {first} {last}");

        let exported = |path: &Path| {
            let set = read(path, &ModelShape::default()).expect("readable");
            let (file, residuals) = set.to_adapter(Component::Transformer).expect("an adapter");
            assert!(residuals.is_empty(), "{}", path.display());
            output(&with(file))
        };
        for file in [
            "lora.safetensors",
            "lora-comfyui.safetensors",
            "lora-kohya.safetensors",
            "lora-peft",
        ] {
            let found = difference(
                &exported(&bench.path(&format!("straight/{file}"))),
                &trained,
            );
            assert!(found < 1e-5, "{init}: {file} is off by {found}");
        }
    }
}

#[test]
fn biases_and_modules_trained_in_full_resume_exactly_alone_move_and_are_exported() {
    let path = root().join("tests/fixtures/parity/pipeline_dev/model/transformer");
    let stored = TensorFile::open(&path.join("diffusion_pytorch_model.safetensors")).expect("base");
    let targets = ["attn.to_q", "proj_mlp"];
    let modules = ["x_embedder", "norm_out.linear", "attn.norm_k"];
    let adapted = |key: &str| {
        let layer = key.strip_suffix(".bias");
        layer.is_some_and(|layer| targets.iter().any(|target| layer.ends_with(target)))
    };
    let saved = |key: &str| {
        let module = key.rsplit_once('.').map_or("", |(module, _)| module);
        modules.iter().any(|name| module.ends_with(name))
    };
    type Expected<'a> = &'a dyn Fn(&str) -> bool;
    let cases: [(&str, String, Expected<'_>); 3] = [
        ("lora_only", "bias = \"lora_only\"".into(), &adapted),
        ("modules", format!("modules_to_save = {modules:?}"), &saved),
        (
            "both",
            format!("modules_to_save = {modules:?}\nbias = \"all\""),
            &|key| saved(key) || key.ends_with(".bias"),
        ),
    ];
    for (case, settings, is_expected) in cases {
        let bench = Workbench::new();
        let section = format!("[lora]\n{settings}\ntarget_modules = {targets:?}\n");
        let config = CONFIG
            .replace("[lora]\n", &section)
            .replace("steps = 40", "steps = 6");
        bench
            .write_config(&(config + "\n[export]\nformats = [\"comfyui\", \"kohya\", \"peft\"]\n"));
        let log = bench.train("straight", "flex", &[]).stderr;
        let log = String::from_utf8_lossy(&log).to_string();
        let expected = bench.result("straight");
        for step in [1, 4] {
            let run = format!("resumed-{step}");
            let checkpoint = format!("ckpt-{step:010}");
            bench.copy_run("straight", &run, |name| {
                name == "cache" || name == "metrics.jsonl" || name == checkpoint
            });
            let again = ["--resume", "--set", "memory.recompute=\"all\""];
            bench.train_ok(&run, "flex", &again);
            let what = format!("{case}, resumed after step {step}");
            bench.result(&run).assert_same(&expected, &what);
        }

        // What was to be trained in full has moved, and nothing else is in the checkpoint.
        let checkpoint = bench.path("straight/ckpt-0000000006/lora.safetensors");
        let trained = AdapterFile::load(&checkpoint, "transformer.").expect("a checkpoint");
        let wanted: Vec<&str> = stored.names().filter(|key| is_expected(key)).collect();
        assert!(wanted.len() >= 8, "{case}: {wanted:?}");
        let found: Vec<&String> = trained.whole().keys().collect();
        assert_eq!(found, wanted, "{case}");
        for (key, value) in trained.whole() {
            let before = stored.read(key).expect("a parameter");
            assert_eq!(value.shape, before.shape, "{case}: {key}");
            assert_ne!(
                value.to_f32(),
                before.to_f32(),
                "{case}: {key} has not moved"
            );
        }
        let folder = AdapterFile::load_peft(&bench.path("straight/lora-peft")).expect("a folder");
        assert!(folder.whole() == trained.whole(), "{case}: PEFT's folder");

        // The LoRA of the run is all that was trained; the other formats say what they have not.
        let exact = output(&with(trained));
        for file in [
            "lora.safetensors",
            "lora-peft",
            "ckpt-0000000006/lora.safetensors",
        ] {
            let path = bench.path(&format!("straight/{file}"));
            let set = read(&path, &ModelShape::default()).expect("readable");
            assert_eq!(set.report.ignored, [], "{case}: {file}");
            let lora = LoadedLora {
                name: "lora".into(),
                set,
                strength: 1.0,
            };
            let model = attach(base(), Component::Transformer, &[lora]).expect("fits");
            let found = difference(&output(&model), &exact);
            assert!(found < 1e-5, "{case}: {file} is off by {found}");
        }
        for file in ["lora-comfyui.safetensors", "lora-kohya.safetensors"] {
            let said = format!("{file}: cannot hold what is trained of");
            assert!(log.contains(&said), "{case}: {log}");
        }
    }
}

/// Six steps of a run that trains a module and biases in full beside a LoRA.
fn in_full(bench: &Workbench, modules: &[&str]) {
    let section = format!(
        "[lora]\nmodules_to_save = {modules:?}\nbias = \"lora_only\"\ntarget_modules = [\"attn.to_q\", \"proj_mlp\"]\n"
    );
    let config = CONFIG
        .replace("[lora]\n", &section)
        .replace("lora_alpha = 7", "lora_alpha = 4") // a scale of 1, so that nothing is folded into the finished file
        .replace("steps = 40", "steps = 6");
    bench.write_config(&config);
}

#[test]
fn what_is_trained_in_full_is_averaged_and_shared_among_devices_and_resumes_exactly() {
    let bench = Workbench::new();
    in_full(&bench, &["x_embedder", "norm_out.linear"]);
    bench.train_ok("one", "flex", &[]);
    let expected = bench.result("one");
    let settings = ["--set=ema.decay=0.5"];
    bench.train_ok("averaged", "flex", &settings);
    let averaged = bench.result("averaged");
    assert!(averaged.checkpoint_lora == expected.checkpoint_lora);
    assert!(averaged.optimizer == expected.optimizer);
    let average = bench.path("averaged/ckpt-0000000006/average.safetensors");
    let average = AdapterFile::load(&average, "transformer.").expect("an average");
    let last = bench.path("averaged/ckpt-0000000006/lora.safetensors");
    let last = AdapterFile::load(&last, "transformer.").expect("a checkpoint");
    let keys = |file: &AdapterFile| file.whole().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&average), keys(&last));
    assert!(keys(&average).len() > 6, "{:?}", keys(&average));
    for (key, value) in average.whole() {
        assert_ne!(value, &last.whole()[key], "{key} is no average");
    }
    let finished = AdapterFile::load(&bench.path("averaged/lora.safetensors"), "transformer.");
    assert!(finished.expect("a LoRA").whole() == average.whole());

    for step in [1, 4] {
        let checkpoint = format!("ckpt-{step:010}");
        for (from, devices, settings) in [
            ("one", "flex,flex", &[][..]),
            ("averaged", "flex", &settings),
            ("averaged", "flex,flex", &settings),
        ] {
            let run = format!("{from}-{devices}-{step}");
            bench.copy_run(from, &run, |name| {
                name == "cache" || name == "metrics.jsonl" || name == checkpoint
            });
            bench.train_ok(&run, devices, &[settings, &["--resume"]].concat());
            let straight = bench.result(from);
            bench.result(&run).assert_same(&straight, &run);
        }
    }
    bench.train_ok("two", "flex,flex", &[]);
    bench.result("two").assert_same(&expected, "by two workers");
}

#[test]
fn what_is_trained_in_full_starts_from_the_few_bits_of_a_checkpoint() {
    let case = "transformer_bnb_nf4";
    let bench = Workbench::new();
    let parity = root().join("tests/fixtures/parity");
    let model = bench.path("model");
    copy(&parity.join("pipeline_dev/model"), &model, &|name| {
        name != "transformer"
    });
    copy(
        &parity.join(case).join("model"),
        &model.join("transformer"),
        &|_| true,
    );
    // One that the checkpoint has in few bits, and one that it has not.
    let module = "transformer_blocks.0.ff.net.2";
    in_full(&bench, &[module, "x_embedder"]);
    let model = format!("--set=model.path={}", model.display());
    let model = model.as_str();
    bench.train_ok("straight", "flex", &[model]);
    let expected = bench.result("straight");
    bench.copy_run("straight", "resumed", |name| {
        ["cache", "metrics.jsonl", "ckpt-0000000003"].contains(&name)
    });
    bench.train_ok("resumed", "flex", &[model, "--resume"]);
    bench.result("resumed").assert_same(&expected, case);

    // It starts where f32 weights start, and moves.
    let still = [
        model,
        "--set=optimizer.learning_rate=1e-30",
        "--set=train.steps=1",
    ];
    let whole = |run: &str, dtype: &str| {
        bench.train_ok(run, "flex", &[&still[..], &[dtype]].concat());
        let path = bench.path(run).join("lora.safetensors");
        let file = AdapterFile::load(&path, "transformer.").expect("a LoRA");
        file.whole().clone()
    };
    let (few, dense) = (
        whole("few", "--set=model.base_dtype=as-stored"),
        whole("dense", "--set=model.base_dtype=f32"),
    );
    assert!(few == dense, "{case}");
    let trained = bench.path("straight/lora.safetensors");
    let trained = AdapterFile::load(&trained, "transformer.").expect("a LoRA");
    let weight = format!("{module}.weight");
    assert_ne!(trained.whole()[&weight], few[&weight], "{case}");

    // What would be rounded before it is trained is refused, with the way that is left.
    for dtype in ["q8", "nf4"] {
        let set = format!("--set=model.base_dtype={dtype}");
        let out = bench.train("refused", "flex", &[model, &set]);
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{text}");
        let says = format!("cannot be together with model.base_dtype = \"{dtype}\"");
        assert!(
            text.contains(&says) && text.contains("use \"as-stored\""),
            "{text}"
        );
    }
    let biases = [
        model,
        "--set=lora.modules_to_save=[]",
        "--set=model.base_dtype=nf4",
    ];
    bench.train_ok("biases", "flex", &biases);

    // A transformer of another model.
    let other = parity.join("transformer_bnb_int8/model");
    let other = format!("--set=model.transformer={}", other.display());
    let out = bench.train("other", "flex", &[model, &other]);
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{text}");
    let says = "reads 20 numbers of CLIP, which gives 24";
    assert!(text.contains(says), "{text}");
}

#[test]
fn what_cannot_be_trained_in_full_is_said_before_training() {
    let bench = Workbench::new();
    bench.write_config(CONFIG);
    let saves = "lora.modules_to_save=[\"x_embedder\"]";
    for (settings, message, status) in [
        (&["lora.bias=\"both\""][..], "lora_only", 2),
        (
            &["lora.modules_to_save=[\"head\"]"],
            "`head` of `modules_to_save` names no module",
            1,
        ),
        (&[saves, "memory.base=\"stream\""], "use \"resident\"", 2),
        (
            &[saves, "model.base_dtype=\"nf4\""],
            "model.base_dtype = \"nf4\"",
            2,
        ),
        (
            &[saves, "lora.init_from=\"x.safetensors\""],
            "remove one of the two",
            2,
        ),
    ] {
        let set = settings.iter().flat_map(|setting| ["--set", setting]);
        let output = bench.train("refused", "flex", &set.collect::<Vec<_>>());
        let text = String::from_utf8_lossy(&output.stderr).to_string();
        assert_eq!(output.status.code(), Some(status), "{settings:?}: {text}");
        assert!(text.contains(message), "{settings:?}: {text}");
        assert!(
            !bench.path("refused").exists(),
            "{settings:?} started a run"
        );
    }
}

#[test]
fn what_a_kind_or_a_format_cannot_do_is_said_before_training() {
    let bench = bench("LOKR");
    for (setting, message) in [
        (
            "lora.lora_dropout=0.1",
            "`lora_dropout` has no meaning for `peft_type` LOKR",
        ),
        (
            "lora.use_dora=true",
            "`use_dora` has no meaning for `peft_type` LOKR",
        ),
        (
            "lora.decompose_factor=0",
            "`decompose_factor` is 0; it must be at least 1, or -1",
        ),
        ("export.formats=[\"kohya\"]", "use \"comfyui\" or \"peft\""),
        (
            "lora.init_from=\"x.safetensors\"",
            "`peft_type` LOKR has none of",
        ),
        (
            "lora.init_lora_weights=\"gaussian\"",
            "must be true or false for `peft_type` LOKR",
        ),
    ] {
        let output = bench.train("refused", "flex", &["--set", setting]);
        let text = String::from_utf8_lossy(&output.stderr).to_string();
        assert_eq!(output.status.code(), Some(2), "{setting}: {text}");
        assert!(text.contains(message), "{setting}: {text}");
        assert!(!bench.path("refused").exists(), "{setting} started a run");
    }
}
