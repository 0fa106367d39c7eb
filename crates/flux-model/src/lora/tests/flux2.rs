//! LoRAs for FLUX.2 in every form: read with and without a model, and written.

use super::formats::{KOHYA, Net, PEFT, dotted, flat};
use super::*;
use crate::flux2::config::Flux2Config;

/// A network with every kind of module and no two equal widths.
fn config() -> Flux2Config {
    Flux2Config {
        in_channels: 6,
        out_channels: Some(4),
        num_layers: 2,
        num_single_layers: 3,
        attention_head_dim: 4,
        num_attention_heads: 2,
        joint_attention_dim: 10,
        timestep_guidance_channels: 12,
        ..Flux2Config::dev()
    }
}

fn shape() -> ModelShape {
    ModelShape {
        flux2: Some(config()),
        ..ModelShape::default()
    }
}

/// Written down from the two implementations, not from the table under test.
fn flux2() -> Net {
    let (h, m) = (HIDDEN, 3 * HIDDEN);
    let mut modules: Vec<Bfl> = Vec::new();
    let mut add = |bfl: String, input: usize, parts: &[(String, usize)]| {
        modules.push((bfl, input, parts.to_vec()))
    };
    for i in 0..2 {
        let bfl = |name: &str| format!("double_blocks.{i}.{name}");
        let own = |name: &str| format!("transformer_blocks.{i}.{name}");
        let qkv = ["to_q", "to_k", "to_v"].map(|name| (own(&format!("attn.{name}")), h));
        add(bfl("img_attn.qkv"), h, &qkv);
        let qkv = ["q", "k", "v"].map(|name| (own(&format!("attn.add_{name}_proj")), h));
        add(bfl("txt_attn.qkv"), h, &qkv);
        add(bfl("img_attn.proj"), h, &[(own("attn.to_out.0"), h)]);
        add(bfl("txt_attn.proj"), h, &[(own("attn.to_add_out"), h)]);
        add(bfl("img_mlp.0"), h, &[(own("ff.linear_in"), 2 * m)]);
        add(bfl("img_mlp.2"), m, &[(own("ff.linear_out"), h)]);
        add(bfl("txt_mlp.0"), h, &[(own("ff_context.linear_in"), 2 * m)]);
        add(bfl("txt_mlp.2"), m, &[(own("ff_context.linear_out"), h)]);
    }
    for i in 0..3 {
        let bfl = |name: &str| format!("single_blocks.{i}.{name}");
        let own = |name: &str| format!("single_transformer_blocks.{i}.attn.{name}");
        add(
            bfl("linear1"),
            h,
            &[(own("to_qkv_mlp_proj"), 3 * h + 2 * m)],
        );
        add(bfl("linear2"), h + m, &[(own("to_out"), h)]);
    }
    let time = "time_guidance_embed.timestep_embedder";
    let guidance = "time_guidance_embed.guidance_embedder";
    let (img, txt) = (
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
    );
    for (bfl, input, own, out) in [
        ("img_in".to_string(), 6, "x_embedder".to_string(), h),
        ("txt_in".into(), 10, "context_embedder".into(), h),
        ("time_in.in_layer".into(), 12, format!("{time}.linear_1"), h),
        ("time_in.out_layer".into(), h, format!("{time}.linear_2"), h),
        (
            "guidance_in.in_layer".into(),
            12,
            format!("{guidance}.linear_1"),
            h,
        ),
        (
            "guidance_in.out_layer".into(),
            h,
            format!("{guidance}.linear_2"),
            h,
        ),
        (format!("{img}.lin"), h, format!("{img}.linear"), 6 * h),
        (format!("{txt}.lin"), h, format!("{txt}.linear"), 6 * h),
        (
            "single_stream_modulation.lin".into(),
            h,
            "single_stream_modulation.linear".into(),
            3 * h,
        ),
        (
            "final_layer.adaLN_modulation.1".into(),
            h,
            "norm_out.linear".into(),
            2 * h,
        ),
        ("final_layer.linear".into(), h, "proj_out".into(), 4),
    ] {
        add(bfl, input, &[(own, out)]);
    }
    Net {
        modules,
        shape: shape(),
    }
}

#[test]
fn every_form_is_read() {
    let net = flux2();
    for (file, scaled, format) in [
        (
            net.diffusers(dotted("transformer."), PEFT, false),
            false,
            "diffusers",
        ),
        (
            net.diffusers(dotted("base_model.model."), PEFT, false),
            false,
            "PEFT",
        ),
        (
            net.bfl(dotted("diffusion_model."), PEFT, false),
            false,
            "ComfyUI",
        ), // ai-toolkit
        (
            net.bfl(dotted("diffusion_model."), KOHYA, true),
            true,
            "ComfyUI",
        ),
        (
            net.bfl(dotted("base_model.model."), PEFT, false),
            false,
            "fal",
        ),
        (net.bfl(flat("lora_unet_"), KOHYA, true), true, "kohya"),
        (
            net.diffusers(flat("lora_transformer_"), KOHYA, true),
            true,
            "OneTrainer",
        ),
        (net.numbered(), true, "OneTrainer OMI"),
        (net.bfl(dotted(""), PEFT, true), true, "BFL"), // OneTrainer, original names
        (
            net.diffusers(flat("lycoris_"), KOHYA, true),
            true,
            "LyCORIS",
        ),
        (
            net.diffusers(dotted("diffusion_model."), PEFT, true),
            true,
            "ComfyUI with diffusers names",
        ),
    ] {
        net.check(&file, scaled, format);
    }
}

#[test]
fn the_network_is_inferred_from_the_file() {
    let net = flux2();
    let set = net.bfl(flat("lora_unet_"), KOHYA, true);
    let set = set.read_as(&ModelShape::default()).expect("valid");
    let found = set.shape.flux2.clone().expect("of FLUX.2");
    let expected = Flux2Config {
        attention_head_dim: HIDDEN, // no key shows it
        num_attention_heads: 1,
        ..config()
    };
    assert_eq!(found, expected);
    assert!(set.shape.transformer.is_none());
}

/// One module is enough, if only FLUX.2 has its name or its sizes; else the header.
#[test]
fn one_module_or_the_header_proves_the_family() {
    let read = |module: &str, (out, input): (usize, usize), header: &[(&str, &str)]| {
        let mut file = Builder::default();
        file.put(&format!("{module}.lora_A.weight"), random("a", 2, input));
        file.put(&format!("{module}.lora_B.weight"), random("b", out, 2));
        header.iter().for_each(|(key, value)| {
            file.header(key, value);
        });
        file.read_as(&ModelShape::default()).expect(module).shape
    };
    let qkv = "diffusion_model.double_blocks.4.img_attn.qkv";
    for (module, size, header) in [
        (
            "transformer.single_transformer_blocks.1.attn.to_qkv_mlp_proj",
            (72, 8),
            &[][..],
        ),
        ("diffusion_model.single_blocks.1.linear2", (8, 32), &[]),
        (
            "base_model.model.double_stream_modulation_img.lin",
            (48, 8),
            &[],
        ),
        (qkv, (3 * 4096, 4096), &[]),
        (
            qkv,
            (24, 8),
            &[("ss_base_model_version", "flux_2_klein_4b")],
        ),
        (
            qkv,
            (24, 8),
            &[("modelspec.architecture", "Flux.2-klein-4b/lora")],
        ),
    ] {
        let shape = read(module, size, header);
        assert!(
            shape.flux2.is_some() && shape.transformer.is_none(),
            "{module}"
        );
    }
    let shape = read(qkv, (24, 8), &[("ss_base_model_version", "flux1")]);
    assert!(shape.transformer.is_some() && shape.flux2.is_none());
    assert_eq!(read(qkv, (3 * 4096, 4096), &[]).hidden_size(), 4096);
}

/// Attention of double-stream blocks alone has the names and, at 3072, the sizes of both families.
#[test]
fn what_fits_both_families_is_said_and_what_proves_one_is_taken() {
    let read = |modules: &[(&str, (usize, usize))], header: &[(&str, &str)]| {
        let mut file = Builder::default();
        for (module, (out, input)) in modules {
            let module = format!("diffusion_model.{module}");
            file.put(&format!("{module}.lora_A.weight"), random("a", 1, *input));
            file.put(&format!("{module}.lora_B.weight"), random("b", *out, 1));
        }
        header.iter().for_each(|(key, value)| {
            file.header(key, value);
        });
        file.read_as(&ModelShape::default()).expect("a LoRA")
    };
    const WIDTH: usize = 3072;
    let qkv = ("double_blocks.4.img_attn.qkv", (3 * WIDTH, WIDTH));
    let proj = ("double_blocks.0.txt_attn.proj", (WIDTH, WIDTH));
    let either = read(&[qkv, proj], &[]);
    assert!(either.report.is_of_either && either.shape.transformer.is_some());
    let warnings = either.report.warnings.join("\n");
    assert!(
        warnings.contains("--model") && warnings.contains("klein 4B"),
        "{warnings}"
    );

    let flux1 = |set: &LoraSet| !set.report.is_of_either && set.shape.transformer.is_some();
    let flux2 = |set: &LoraSet| !set.report.is_of_either && set.shape.flux2.is_some();
    let sixth = ("double_blocks.5.img_attn.qkv", (3 * WIDTH, WIDTH));
    assert!(flux1(&read(&[qkv, sixth], &[])), "klein 4B has five");
    let modulation = ("double_blocks.0.img_mod.lin", (6 * WIDTH, WIDTH));
    assert!(flux1(&read(&[qkv, modulation], &[])));
    let single = ("single_blocks.0.linear1", (7 * WIDTH, WIDTH));
    assert!(flux1(&read(&[qkv, single], &[])));
    let single = ("single_blocks.0.linear1", (9 * WIDTH, WIDTH));
    assert!(flux2(&read(&[qkv, single], &[])));
    assert!(flux2(&read(&[qkv, ("txt_in", (WIDTH, 7680))], &[])));
    assert!(flux1(&read(&[qkv, ("txt_in", (WIDTH, 4096))], &[])));
    assert!(flux2(&read(
        &[qkv, ("final_layer.linear", (128, WIDTH))],
        &[]
    )));
    let header = |base| [("ss_base_model_version", base)];
    assert!(flux1(&read(&[qkv], &header("flux1"))));
    assert!(flux2(&read(&[qkv], &header("flux_2_klein_4b"))));
}

#[test]
fn a_lora_for_flux_1_is_refused() {
    let mut file = Builder::default();
    for (module, out) in [("attn.to_q", 8), ("proj_mlp", 32)] {
        let module = format!("transformer.single_transformer_blocks.0.{module}");
        file.put(&format!("{module}.lora_A.weight"), random("a", 2, 8));
        file.put(&format!("{module}.lora_B.weight"), random("b", out, 2));
    }
    let error = file.read_as(&shape()).expect_err("of FLUX.1").to_string();
    assert!(
        error.ends_with("is a key of a LoRA for FLUX.1, not for FLUX.2"),
        "{error}"
    );
}

#[test]
fn lycoris_forms_are_read_and_written() {
    let net = flux2();
    let name = "double_blocks.1.img_attn.qkv";
    let linear1 = "single_blocks.2.linear1";
    let mut file = Builder::default();
    let kohya = |module: &str| format!("lora_unet_{}", module.replace('.', "_"));
    file.put(&format!("{}.lokr_w1", kohya(name)), random("w1", 3, 2));
    file.put(&format!("{}.lokr_w2_a", kohya(name)), random("w2a", 8, 2));
    file.put(&format!("{}.lokr_w2_b", kohya(name)), random("w2b", 2, 4));
    file.scalar(&format!("{}.alpha", kohya(name)), 3.0);
    for (part, rows, columns) in [
        ("w1_a", 72, 2),
        ("w1_b", 2, 8),
        ("w2_a", 72, 3),
        ("w2_b", 3, 8),
    ] {
        let key = format!("{}.hada_{part}", kohya(linear1));
        file.put(&key, random(part, rows, columns));
    }
    file.scalar(&format!("{}.alpha", kohya(linear1)), 5.0);
    let set = file.read_as(&ModelShape::default()).expect("valid");
    assert_eq!(set.len(), 4);
    assert!(set.shape.flux2.is_some());
    let folder = tempfile::tempdir().expect("a temporary folder");
    for format in [LoraFormat::Kohya, LoraFormat::ComfyUi] {
        let path = folder.path().join("out.safetensors");
        write(&set, format, &path, &f32_options()).expect("a set the format can hold");
        let back = read(&path, &net.shape).expect("what was written");
        for path in set.transformer.keys() {
            assert_close(&change(&back, path), &change(&set, path), path);
        }
    }
}

/// Every format has every change; ComfyUI's has PEFT's parameters and no alpha, so that diffusers loads it too.
#[test]
fn every_format_is_written() {
    let net = flux2();
    let set = net.bfl(flat("lora_unet_"), KOHYA, true);
    let set = set.read_as(&net.shape).expect("valid");
    let expected = net.expected(true);
    let folder = tempfile::tempdir().expect("a temporary folder");
    for format in LoraFormat::ALL {
        let path = folder.path().join(format.name());
        write(&set, format, &path, &f32_options()).expect("a set the format can hold");
        for shape in [&net.shape, &ModelShape::default()] {
            let back = read(&path, shape).expect("what was written");
            assert_eq!(back.report.ignored, [], "{format}");
            assert_eq!(back.transformer.len(), expected.len(), "{format}");
            for (path, expected) in &expected {
                assert_close(&change(&back, path), expected, &format!("{format}: {path}"));
            }
        }
    }
    let open = |format: LoraFormat| {
        let path = folder.path().join(format.name());
        lora_core::files::safetensors::TensorFile::open(&path).expect("a file")
    };
    let portable = open(LoraFormat::ComfyUi);
    for key in portable.names() {
        let is_factor = key.ends_with(".lora_A.weight") || key.ends_with(".lora_B.weight");
        assert!(key.starts_with("diffusion_model.") && is_factor, "{key}");
    }
    assert_eq!(portable.names().count(), 2 * net.modules.len());
    let kohya = open(LoraFormat::Kohya);
    let entries = [
        "ss_base_model_version",
        "ss_network_module",
        "modelspec.architecture",
    ];
    assert_eq!(
        entries.map(|key| kohya.metadata()[key].as_str()),
        ["flux_2_dev", "networks.lora_flux_2", "Flux.2-dev/lora"]
    );
    let config = std::fs::read_to_string(folder.path().join("peft/adapter_config.json"));
    assert!(
        config
            .expect("readable")
            .contains("Flux2Transformer2DModel")
    );
}
