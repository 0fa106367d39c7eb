//! Every spelling of the same LoRA gives the same changes.

use super::*;

/// A network whose LoRAs are spelled in every way.
pub(super) struct Net {
    pub modules: Vec<Bfl>,
    pub shape: ModelShape,
}

fn flux1() -> Net {
    Net {
        modules: modules(),
        shape: shape(),
    }
}

/// A part of a module: diffusers' path, BFL's with the part's number, down, up and alpha.
type Split = (String, String, HostTensor, HostTensor, f32);

impl Net {
    /// Down, up and alpha of each of BFL's modules.
    fn reference(&self) -> BTreeMap<String, (HostTensor, HostTensor, f32)> {
        let factors = |(i, (name, input, parts)): (usize, &Bfl)| {
            let (rank, out) = (2 + i % 3, parts.iter().map(|(_, height)| height).sum());
            let down = random(&format!("{name} down"), rank, *input);
            let up = random(&format!("{name} up"), out, rank);
            (name.clone(), (down, up, 1.0 + i as f32))
        };
        self.modules.iter().enumerate().map(factors).collect()
    }

    /// The change of each diffusers module.
    pub(super) fn expected(&self, scaled: bool) -> BTreeMap<String, Vec<f32>> {
        let reference = self.reference();
        let mut all = BTreeMap::new();
        for (name, input, parts) in &self.modules {
            let (down, up, alpha) = &reference[name];
            let scale = match scaled {
                true => f64::from(*alpha) / down.shape[0] as f64,
                false => 1.0,
            };
            let whole = product(up, down, scale);
            let mut row = 0;
            for (path, height) in parts {
                let part = rows(&whole, *input, row..row + height);
                let part = match path.as_str() {
                    "norm_out.linear" => swapped(&part),
                    _ => part,
                };
                all.insert(path.clone(), part);
                row += height;
            }
        }
        all
    }

    /// Reads the file with and without knowing the network and compares every module.
    #[track_caller]
    pub(super) fn check(&self, file: &Builder, scaled: bool, format: &str) {
        let expected = self.expected(scaled);
        for shape in [self.shape.clone(), ModelShape::default()] {
            let set = file.read_as(&shape).expect(format);
            assert_eq!(set.report.ignored, [], "{format}");
            assert_eq!(set.report.used, file.tensors.len(), "{format}");
            let formats = &set.report.formats;
            assert!(formats.contains_key(format), "{format}: {formats:?}");
            for path in set.transformer.keys() {
                let what = format!("{format}: {path}");
                assert_close(&change(&set, path), &expected[path], &what);
            }
        }
    }

    /// A file with BFL's modules, whose names `spell` turns into the front of a key.
    pub(super) fn bfl(
        &self,
        spell: impl Fn(&str) -> String,
        (down, up): (&str, &str),
        alpha: bool,
    ) -> Builder {
        let modules = self.reference().into_iter();
        let modules = modules.map(|(name, (a, b, value))| (spell(&name), a, b, value));
        low_rank(modules, (down, up), alpha)
    }

    /// The parts of BFL's modules, each with its own copy of the down projection.
    pub(super) fn split_modules(&self) -> Vec<Split> {
        let reference = self.reference();
        let mut all = Vec::new();
        for (name, _, parts) in &self.modules {
            let (down, up, alpha) = &reference[name];
            let mut row = 0;
            for (i, (path, height)) in parts.iter().enumerate() {
                let mut part = up.rows(row..row + height);
                if path == "norm_out.linear" {
                    let values = swapped(&part.to_f32());
                    part = tensor(part.shape[0], part.shape[1], &values);
                }
                let numbered = format!("{name}.{i}");
                all.push((path.clone(), numbered, down.clone(), part, *alpha));
                row += height;
            }
        }
        all
    }

    pub(super) fn diffusers(
        &self,
        spell: impl Fn(&str) -> String,
        (down, up): (&str, &str),
        alpha: bool,
    ) -> Builder {
        let modules = self.split_modules().into_iter();
        let modules = modules.map(|(path, _, a, b, value)| (spell(&path), a, b, value));
        low_rank(modules, (down, up), alpha)
    }

    /// OneTrainer's OMI form: the parts of fused modules have numbers.
    pub(super) fn numbered(&self) -> Builder {
        let modules = self.split_modules().into_iter();
        let modules = modules.map(|(path, numbered, a, b, alpha)| {
            let is_fused = self.modules.iter().any(|(_, _, parts)| {
                parts.len() > 1 && parts.iter().any(|(part, _)| *part == path)
            });
            let name = match is_fused {
                true => format!("transformer.{numbered}"),
                false => format!("transformer.{path}"),
            };
            (name, a, b, alpha)
        });
        low_rank(modules, (".lora_down.weight", ".lora_up.weight"), true)
    }
}

/// A file with down and up projections and, if wanted, alphas, by the fronts of their keys.
fn low_rank(
    modules: impl Iterator<Item = (String, HostTensor, HostTensor, f32)>,
    (down, up): (&str, &str),
    alpha: bool,
) -> Builder {
    let mut file = Builder::default();
    for (module, a, b, value) in modules {
        file.put(&format!("{module}{down}"), a)
            .put(&format!("{module}{up}"), b);
        if alpha {
            file.scalar(&format!("{module}.alpha"), value);
        }
    }
    file
}

#[track_caller]
fn check(file: &Builder, scaled: bool, format: &str) {
    flux1().check(file, scaled, format);
}

fn bfl(spell: impl Fn(&str) -> String, down: &str, up: &str, alpha: bool) -> Builder {
    flux1().bfl(spell, (down, up), alpha)
}

fn diffusers(spell: impl Fn(&str) -> String, down: &str, up: &str, alpha: bool) -> Builder {
    flux1().diffusers(spell, (down, up), alpha)
}

pub(super) fn flat(prefix: &'static str) -> impl Fn(&str) -> String {
    move |name| format!("{prefix}{}", name.replace('.', "_"))
}

pub(super) fn dotted(prefix: &'static str) -> impl Fn(&str) -> String {
    move |name| format!("{prefix}{name}")
}

pub(super) const KOHYA: (&str, &str) = (".lora_down.weight", ".lora_up.weight");
pub(super) const PEFT: (&str, &str) = (".lora_A.weight", ".lora_B.weight");
pub(super) const NAMED: (&str, &str) = (".lora_A.default.weight", ".lora_B.default.weight");

#[test]
fn kohya() {
    check(
        &bfl(flat("lora_unet_"), KOHYA.0, KOHYA.1, true),
        true,
        "kohya",
    );
    check(
        &bfl(flat("lora_unet_"), KOHYA.0, KOHYA.1, false),
        false,
        "kohya",
    );
}

#[test]
fn kohya_with_diffusers_names() {
    let format = "kohya with diffusers names";
    check(
        &diffusers(flat("lora_unet_"), KOHYA.0, KOHYA.1, true),
        true,
        format,
    );
    let underscore = |name: &str| format!("lora_unet_{}_", name.replace('.', "_"));
    check(&diffusers(underscore, KOHYA.0, KOHYA.1, true), true, format);
}

#[test]
fn diffusers_files() {
    check(
        &diffusers(dotted("transformer."), PEFT.0, PEFT.1, false),
        false,
        "diffusers",
    );
    check(
        &diffusers(dotted("transformer."), PEFT.0, PEFT.1, true),
        true,
        "diffusers",
    );
    let mixed = "diffusers with kohya parameters";
    check(
        &diffusers(dotted("transformer."), KOHYA.0, KOHYA.1, true),
        true,
        mixed,
    );
    check(
        &diffusers(dotted("unet."), PEFT.0, PEFT.1, false),
        false,
        "diffusers",
    );
}

#[test]
fn old_diffusers_files() {
    let old = "diffusers, old";
    check(
        &diffusers(
            dotted("transformer."),
            ".lora.down.weight",
            ".lora.up.weight",
            false,
        ),
        false,
        old,
    );
    let processor = |name: &str| match name.split_once(".attn.") {
        Some((block, "to_out.0")) => {
            format!("transformer.{block}.attn.processor.to_out")
        }
        Some((block, leaf)) => format!("transformer.{block}.attn.processor.{leaf}"),
        None => format!("transformer.{name}"),
    };
    check(
        &diffusers(processor, "_lora.down.weight", "_lora.up.weight", false),
        false,
        old,
    );
}

#[test]
fn peft_names_without_a_folder() {
    let file = diffusers(dotted("base_model.model."), PEFT.0, PEFT.1, false);
    check(&file, false, "PEFT");
    let warning = "no `adapter_config.json` beside the weights: alpha is taken to equal the rank";
    assert_eq!(file.read().report.warnings, [warning]);
    check(
        &diffusers(dotted("base_model.model."), NAMED.0, NAMED.1, false),
        false,
        "PEFT",
    );
}

#[test]
fn names_without_a_prefix() {
    let format = "diffusers without prefix";
    check(
        &diffusers(dotted(""), NAMED.0, NAMED.1, false),
        false,
        format,
    );
    check(
        &diffusers(dotted(""), ".lora_A", ".lora_B", false),
        false,
        format,
    );
    check(&bfl(dotted(""), PEFT.0, PEFT.1, true), true, "BFL");
}

#[test]
fn comfyui() {
    check(
        &bfl(dotted("diffusion_model."), KOHYA.0, KOHYA.1, true),
        true,
        "ComfyUI",
    );
    check(
        &bfl(dotted("diffusion_model."), PEFT.0, PEFT.1, false),
        false,
        "ComfyUI",
    );
    let format = "ComfyUI with diffusers names";
    check(
        &diffusers(dotted("diffusion_model."), PEFT.0, PEFT.1, true),
        true,
        format,
    );
}

#[test]
fn fal() {
    check(
        &bfl(dotted("base_model.model."), PEFT.0, PEFT.1, false),
        false,
        "fal",
    );
}

#[test]
fn onetrainer() {
    check(
        &diffusers(flat("lora_transformer_"), KOHYA.0, KOHYA.1, true),
        true,
        "OneTrainer",
    );
}

#[test]
fn onetrainer_omi_numbers_the_parts() {
    check(&flux1().numbered(), true, "OneTrainer OMI");
}

#[test]
fn lycoris_wrapper_with_plain_factors() {
    check(
        &diffusers(flat("lycoris_"), KOHYA.0, KOHYA.1, true),
        true,
        "LyCORIS",
    );
}

#[test]
fn wrappers_around_modules() {
    for prefix in [
        "module.transformer.",
        "_orig_mod.module.transformer._orig_mod.",
        "transformer._fsdp_wrapped_module.",
    ] {
        check(
            &diffusers(dotted(prefix), PEFT.0, PEFT.1, false),
            false,
            "diffusers",
        );
    }
    check(
        &bfl(dotted("model.diffusion_model."), KOHYA.0, KOHYA.1, true),
        true,
        "ComfyUI",
    );
    let inside = |name: &str| {
        format!(
            "transformer.{}",
            name.replacen("blocks.0.", "blocks.0._checkpoint_wrapped_module.", 1)
        )
    };
    check(
        &diffusers(inside, PEFT.0, PEFT.1, false),
        false,
        "diffusers",
    );
}

#[test]
fn xlabs() {
    let names = [
        (
            "double_blocks.1.processor.qkv_lora1",
            "double_blocks.1.img_attn.qkv",
            24,
        ),
        (
            "double_blocks.1.processor.qkv_lora2",
            "double_blocks.1.txt_attn.qkv",
            24,
        ),
        (
            "double_blocks.1.processor.proj_lora1",
            "double_blocks.1.img_attn.proj",
            8,
        ),
        (
            "double_blocks.1.processor.proj_lora2",
            "double_blocks.1.txt_attn.proj",
            8,
        ),
        (
            "single_blocks.2.processor.qkv_lora",
            "single_blocks.2.linear1",
            24,
        ),
        (
            "single_blocks.2.processor.proj_lora",
            "single_blocks.2.linear2",
            8,
        ),
    ];
    let reference = flux1().reference();
    for prefix in ["", "diffusion_model."] {
        let mut file = Builder::default();
        for (name, bfl, height) in names {
            let (down, up, _) = &reference[bfl];
            file.put(&format!("{prefix}{name}.down.weight"), down.clone());
            file.put(&format!("{prefix}{name}.up.weight"), up.rows(0..height));
        }
        check(&file, false, "XLabs");
        let set = file.read();
        assert_eq!(set.len(), 3 + 3 + 1 + 1 + 3 + 1);
        assert!(
            !set.transformer
                .contains_key("single_transformer_blocks.2.proj_mlp")
        );
    }
}

#[test]
fn mixed_spellings_in_one_file() {
    let mut file = Builder::default();
    let all = flux1().split_modules();
    for (i, (path, _, a, b, alpha)) in all.iter().enumerate() {
        let (module, (down, up)) = match i % 4 {
            0 => (format!("transformer.{path}"), PEFT),
            1 => (
                format!("lora_transformer_{}", path.replace('.', "_")),
                KOHYA,
            ),
            2 => (
                format!("lycoris_{}", path.replace('.', "_")),
                (".lora.down.weight", ".lora.up.weight"),
            ),
            _ => (path.clone(), NAMED),
        };
        file.put(&format!("{module}{down}"), a.clone())
            .put(&format!("{module}{up}"), b.clone());
        file.scalar(&format!("{module}.alpha"), *alpha);
    }
    check(&file, true, "diffusers");
    assert_eq!(file.read().len(), all.len());
}

#[test]
fn text_encoders_of_all_families() {
    let clip = "text_model.encoder.layers.1.mlp.fc1";
    let t5 = "encoder.block.1.layer.0.SelfAttention.q";
    let (a, b) = (random("a", 2, 6), random("b", 12, 2));
    let (c, d) = (random("c", 3, 6), random("d", 4, 3));
    for (clip_module, t5_module, (down, up)) in [
        (flat("lora_te1_")(clip), flat("lora_te3_")(t5), KOHYA),
        (flat("lora_te_")(clip), flat("lora_te2_")(t5), KOHYA),
        (
            dotted("text_encoder.")(clip),
            dotted("text_encoder_2.")(t5),
            PEFT,
        ),
        (
            dotted("text_encoder.")(clip),
            dotted("text_encoder_2.")(t5),
            (
                ".lora_linear_layer.down.weight",
                ".lora_linear_layer.up.weight",
            ),
        ),
        (
            dotted("text_encoders.clip_l.transformer.")(clip),
            dotted("text_encoders.t5xxl.transformer.")(t5),
            KOHYA,
        ),
        (
            dotted("base_model.model.")(clip),
            dotted("base_model.model.")(t5),
            PEFT,
        ),
        (dotted("clip_l.")(clip), dotted("t5.")(t5), KOHYA),
    ] {
        let mut file = Builder::default();
        for (module, down_tensor, up_tensor) in [(&clip_module, &a, &b), (&t5_module, &c, &d)] {
            file.put(&format!("{module}{down}"), down_tensor.clone());
            file.put(&format!("{module}{up}"), up_tensor.clone());
            file.scalar(&format!("{module}.alpha"), 6.0);
        }
        for shape in [shape(), ModelShape::default()] {
            let set = file.read_as(&shape).expect(&clip_module);
            assert_eq!(
                (set.transformer.len(), set.clip.len(), set.t5.len()),
                (0, 1, 1)
            );
            let values = |update: &ModuleUpdate| delta(update, None).expect("readable");
            assert_close(
                &values(&set.clip[clip]),
                &product(&b, &a, 3.0),
                &clip_module,
            );
            assert_close(&values(&set.t5[t5]), &product(&d, &c, 2.0), &t5_module);
        }
    }
}

#[test]
fn bfl_control_has_biases_norms_and_a_wider_input() {
    let mut file = bfl(dotted(""), PEFT.0, PEFT.1, false);
    let rank = file.tensors["img_in.lora_A.weight"].shape[0];
    file.tensors.insert(
        "img_in.lora_A.weight".into(),
        random("img_in down", rank, 12),
    );
    let names: Vec<_> = flux1().reference().into_keys().collect();
    for name in &names {
        let out = file.tensors[&format!("{name}.lora_B.weight")].shape[0];
        file.put(
            &format!("{name}.lora_B.bias"),
            HostTensor::from_f32([out], &noise(name, out)),
        );
    }
    for norm in [
        "double_blocks.1.txt_attn.norm.key_norm.scale",
        "single_blocks.0.norm.query_norm.scale",
    ] {
        file.put(norm, HostTensor::from_f32([4], &noise(norm, 4)));
    }
    let set = file.read();
    assert_eq!(set.report.ignored, []);
    assert_eq!(set.in_channels, Some(12));
    assert_eq!(
        set.report.warnings,
        [
            "the LoRA needs an `x_embedder` of 12 input channels: pad its weight with zeros (control LoRAs)"
        ]
    );
    assert_eq!(set.transformer["x_embedder"].size(), Some((8, 12)));

    let bias = |path: &str| {
        set.transformer[path]
            .bias_values()
            .expect("readable")
            .map(|bias| bias.to_f32())
    };
    let stored = noise("double_blocks.0.img_attn.qkv", 24);
    assert_eq!(
        bias("transformer_blocks.0.attn.to_k").as_deref(),
        Some(&stored[8..16])
    );
    let stored = noise("final_layer.adaLN_modulation.1", 16);
    assert_eq!(bias("norm_out.linear"), Some(swapped(&stored)));

    let gain = set.transformer["transformer_blocks.1.attn.norm_added_k"].replacement();
    let gain = gain.expect("a norm's gain is replaced");
    let stored = noise("double_blocks.1.txt_attn.norm.key_norm.scale", 4);
    assert_eq!(gain.load_f32().expect("readable"), stored);
    assert!(
        set.transformer
            .contains_key("single_transformer_blocks.0.attn.norm_q")
    );

    // Without a model, the width is that of the file.
    let inferred = file.read_as(&ModelShape::default()).expect("valid");
    assert_eq!(
        inferred.shape.transformer.expect("inferred").in_channels,
        12
    );
}

#[test]
fn a_narrower_input_is_padded_for_a_wider_model() {
    let mut file = Builder::default();
    file.put("transformer.x_embedder.lora_A.weight", random("a", 2, 4));
    file.put("transformer.x_embedder.lora_B.weight", random("b", 8, 2));
    let values = change(&file.read(), "x_embedder");
    let narrow = product(&random("b", 8, 2), &random("a", 2, 4), 1.0);
    for (wide, narrow) in values.chunks_exact(6).zip(narrow.chunks_exact(4)) {
        assert_close(&wide[..4], narrow, "old columns");
        assert_eq!(wide[4..], [0.0, 0.0]);
    }
}

#[test]
fn sizes_are_inferred_from_the_file() {
    let set = bfl(flat("lora_unet_"), KOHYA.0, KOHYA.1, true)
        .read_as(&ModelShape::default())
        .expect("valid");
    let config = set.shape.transformer.expect("inferred");
    assert_eq!(
        (
            config.num_layers,
            config.num_single_layers,
            config.hidden_size()
        ),
        (2, 3, 8)
    );
    assert_eq!((config.in_channels, config.out_channels()), (6, 4));
    assert_eq!(
        (config.joint_attention_dim, config.pooled_projection_dim),
        (10, 5)
    );
}

/// The public cases, made with other programs.
#[test]
fn zoo() {
    let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parity/lora_zoo");
    let config = std::fs::read_to_string(zoo.join("../pipeline_dev/model/transformer/config.json"))
        .expect("a fixture");
    let shape = ModelShape {
        transformer: Some(serde_json::from_str(&config).expect("a configuration")),
        ..ModelShape::default()
    };
    for (case, modules, scale) in [
        ("s1_diffusers_metadata/lora.safetensors", 16, 7.0 / 4.0),
        ("s1_kohya/lora.safetensors", 16, 7.0 / 4.0),
        ("s2_peft_dir/adapter", 46, 7.0 / 4.0),
    ] {
        for shape in [&shape, &ModelShape::default()] {
            let set = read(&zoo.join(case), shape).expect(case);
            assert_eq!(set.transformer.len(), modules, "{case}");
            assert_eq!(
                (set.report.ignored.len(), set.report.warnings.len()),
                (0, 0),
                "{case}"
            );
            assert!(
                set.transformer.values().all(|update| update.scale == scale),
                "{case}"
            );
            set.validate().expect(case);
        }
    }
}

/// Two spellings of the same LoRA, from two programs.
#[test]
fn the_zoo_s_kohya_file_is_its_diffusers_file() {
    let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parity/lora_zoo");
    let open = |case: &str| {
        read(
            &zoo.join(case).join("lora.safetensors"),
            &ModelShape::default(),
        )
        .expect(case)
    };
    let (first, second) = (open("s1_diffusers_metadata"), open("s1_kohya"));
    for path in first.transformer.keys() {
        assert_close(&change(&first, path), &change(&second, path), path);
    }
}
