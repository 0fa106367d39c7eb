//! DoRA: both axes, all names, fused modules.

use super::*;

const QKV: &str = "double_blocks.0.img_attn.qkv";
const PARTS: [&str; 3] = ["attn.to_q", "attn.to_k", "attn.to_v"];

fn part(i: usize) -> String {
    format!("transformer_blocks.0.{}", PARTS[i])
}

fn base(path: &str) -> Option<Vec<f32>> {
    Some(noise(&format!("weight of {path}"), 64))
}

/// Fused base weight of the attention module.
fn fused_base() -> Vec<f32> {
    (0..3)
        .flat_map(|i| base(&part(i)).expect("a weight"))
        .collect()
}

/// `m * V / norm(V) - W` in double precision.
fn expected(
    weight: &[f32],
    change: &[f32],
    magnitude: &[f32],
    columns: usize,
    per_row: bool,
) -> Vec<f32> {
    let changed: Vec<f64> = weight
        .iter()
        .zip(change)
        .map(|(w, c)| f64::from(*w) + f64::from(*c))
        .collect();
    let index = |at: usize| if per_row { at / columns } else { at % columns };
    let mut squares = vec![0.0; magnitude.len()];
    changed
        .iter()
        .enumerate()
        .for_each(|(at, x)| squares[index(at)] += x * x);
    let value = |(at, x): (usize, &f64)| {
        f64::from(magnitude[index(at)]) * x / squares[index(at)].sqrt() - f64::from(weight[at])
    };
    changed
        .iter()
        .enumerate()
        .map(value)
        .map(|x| x as f32)
        .collect()
}

fn factors() -> (HostTensor, HostTensor) {
    (random("down", 2, 8), random("up", 24, 2))
}

#[test]
fn all_names_of_the_output_axis() {
    let (down, up) = (random("a", 2, 8), random("b", 8, 2));
    let values = noise("m", 8);
    let q = part(0);
    let weight = base(&q).expect("a weight");
    let wanted = expected(&weight, &product(&up, &down, 1.0), &values, 8, true);
    for (suffix, shape) in [
        ("lora_magnitude_vector", vec![8]),
        ("lora_magnitude_vector.weight", vec![8]),
        ("lora_magnitude_vector.default.weight", vec![8]),
        ("magnitude", vec![8]),
        ("dora_scale", vec![8, 1]),
        ("dora_scale", vec![8]),
    ] {
        let mut file = Builder::default();
        file.put(&format!("transformer.{q}.lora_A.weight"), down.clone());
        file.put(&format!("transformer.{q}.lora_B.weight"), up.clone());
        file.put(
            &format!("transformer.{q}.{suffix}"),
            HostTensor::from_f32(shape, &values),
        );
        let set = file.read();
        let update = &set.transformer[&q];
        assert_eq!(
            update.magnitude.as_ref().map(|m| &m.axis),
            Some(&Axis::Output),
            "{suffix}"
        );
        assert_close(
            &delta(update, Some(&weight)).expect("readable"),
            &wanted,
            suffix,
        );
        assert_eq!(set.report.formats["DoRA"], 1);
        let (adapter, residuals) = set.to_adapter(Component::Transformer).expect("readable");
        assert!(residuals.is_empty() && adapter.modules()[&q].use_dora);
    }
}

#[test]
fn the_input_axis_of_a_whole_module_is_a_residual() {
    let (down, up) = (random("a", 2, 8), random("b", 8, 2));
    let q = part(0);
    let mut file = Builder::default();
    let module = "lora_transformer_transformer_blocks_0_attn_to_q";
    file.put(&format!("{module}.lora_down.weight"), down.clone())
        .put(&format!("{module}.lora_up.weight"), up.clone());
    file.scalar(&format!("{module}.alpha"), 1.0);
    file.put(
        &format!("{module}.dora_scale"),
        HostTensor::from_f32([1, 8], &noise("m", 8)),
    );
    let set = file.read();
    let weight = base(&q).expect("a weight");
    let wanted = expected(&weight, &product(&up, &down, 0.5), &noise("m", 8), 8, false);
    assert_close(
        &delta(&set.transformer[&q], Some(&weight)).expect("readable"),
        &wanted,
        "delta",
    );
    let (adapter, residuals) = set.to_adapter(Component::Transformer).expect("readable");
    assert!(adapter.modules().is_empty());
    let residual = &residuals[0];
    assert_eq!(
        (residual.parameter.as_str(), residual.change),
        ("transformer_blocks.0.attn.to_q.weight", Change::Add)
    );
    let values = residual.load(&mut base).expect("readable");
    assert_eq!(values.shape, [8, 8]);
    assert_close(&values.to_f32(), &wanted, "residual");
    assert_eq!(
        residual
            .load(&mut |_| None)
            .expect_err("no base")
            .to_string(),
        "the change of `transformer_blocks.0.attn.to_q` depends on the base weight of `transformer_blocks.0.attn.to_q`, which was not given"
    );
}

fn fused_file(magnitude: HostTensor) -> Builder {
    let (down, up) = factors();
    let mut file = Builder::default();
    file.put(&format!("diffusion_model.{QKV}.lora_down.weight"), down);
    file.put(&format!("diffusion_model.{QKV}.lora_up.weight"), up);
    file.put(&format!("diffusion_model.{QKV}.dora_scale"), magnitude);
    file
}

/// The fused module, changed as a whole, is the reference for its parts.
#[test]
fn both_axes_of_a_fused_module_change_the_parts_as_the_whole() {
    let (down, up) = factors();
    let change = product(&up, &down, 1.0);
    for (magnitude, per_row) in [
        (HostTensor::from_f32([24, 1], &noise("m", 24)), true),
        (HostTensor::from_f32([1, 8], &noise("m", 8)), false),
    ] {
        let whole = expected(&fused_base(), &change, &magnitude.to_f32(), 8, per_row);
        let set = fused_file(magnitude).read();
        for i in 0..3 {
            let change = set
                .weight_delta(Component::Transformer, &part(i), &mut base)
                .expect("readable");
            assert_close(
                &change.expect("changed"),
                &rows(&whole, 8, i * 8..(i + 1) * 8),
                &part(i),
            );
        }
        let (_, residuals) = set.to_adapter(Component::Transformer).expect("readable");
        assert_eq!(residuals.len(), if per_row { 0 } else { 3 });
        for (i, residual) in residuals.iter().enumerate() {
            let path = residual.parameter.trim_end_matches(".weight");
            let i = PARTS
                .iter()
                .position(|part| path.ends_with(part))
                .unwrap_or(i);
            let values = residual.load(&mut base).expect("readable").to_f32();
            assert_close(&values, &rows(&whole, 8, i * 8..(i + 1) * 8), path);
        }
        // ComfyUI's and kohya's formats have the fused module again.
        for format in [LoraFormat::ComfyUi, LoraFormat::Kohya] {
            assert_same(&through(&set, format, &f32_options()), &set);
        }
    }
}

#[test]
fn the_input_axis_of_a_fused_module_is_no_peft_adapter() {
    let set = fused_file(HostTensor::from_f32([1, 8], &noise("m", 8))).read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("out.safetensors");
    let error = write(&set, LoraFormat::Diffusers, &path, &WriteOptions::default())
        .expect_err("impossible");
    assert_eq!(
        error.to_string(),
        "diffusers cannot hold 3 of the modules, such as `transformer.transformer_blocks.0.attn.to_k`: its DoRA magnitude counts inputs; PEFT's counts outputs; choose another format, or allow losses"
    );
}

#[test]
fn the_input_axis_of_parts_cannot_be_fused() {
    let mut file = Builder::default();
    for i in 0..3 {
        let module = format!("lora_transformer_{}", part(i).replace('.', "_"));
        file.put(&format!("{module}.lora_down.weight"), random("down", 2, 8));
        file.put(&format!("{module}.lora_up.weight"), random(&module, 8, 2));
        file.put(
            &format!("{module}.dora_scale"),
            HostTensor::from_f32([1, 8], &noise(&module, 8)),
        );
    }
    let set = file.read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("out.safetensors");
    let error =
        write(&set, LoraFormat::Kohya, &path, &WriteOptions::default()).expect_err("impossible");
    assert_eq!(
        error.to_string(),
        "kohya cannot hold 3 of the modules, such as `transformer.transformer_blocks.0.attn.to_q`: a DoRA magnitude of the input axis belongs to the part it was trained with; choose another format, or allow losses"
    );
    // ComfyUI loads the parts under their diffusers names.
    let back = through(&set, LoraFormat::ComfyUi, &f32_options());
    assert!(
        back.report
            .formats
            .contains_key("diffusers with kohya parameters")
    );
    assert_same(&back, &set);
}

#[test]
fn the_output_axis_passes_through_every_format() {
    let mut file = fused_file(HostTensor::from_f32([24, 1], &noise("m", 24)));
    let adaln = "diffusion_model.final_layer.adaLN_modulation.1";
    file.put(&format!("{adaln}.lora_down.weight"), random("c", 2, 8));
    file.put(&format!("{adaln}.lora_up.weight"), random("d", 16, 2));
    file.put(
        &format!("{adaln}.dora_scale"),
        HostTensor::from_f32([16, 1], &noise("n", 16)),
    );
    let set = file.read();
    let Some(magnitude) = &set.transformer["norm_out.linear"].magnitude else {
        panic!("a magnitude")
    };
    assert_eq!(
        magnitude.values.load_f32().expect("readable"),
        swapped(&noise("n", 16))
    );
    for format in LoraFormat::ALL {
        assert_same(&through(&set, format, &f32_options()), &set);
    }
}

#[test]
fn peft_wants_a_magnitude_on_all_modules_or_none() {
    let mut file = fused_file(HostTensor::from_f32([24, 1], &noise("m", 24)));
    file.put("transformer.proj_out.lora_A.weight", random("a", 2, 8));
    file.put("transformer.proj_out.lora_B.weight", random("b", 4, 2));
    let set = file.read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("out.safetensors");
    let options = WriteOptions {
        lossy: true,
        ..WriteOptions::default()
    };
    let report = write(&set, LoraFormat::Diffusers, &path, &options).expect("losses are allowed");
    assert_eq!(
        report.losses,
        [Loss {
            module: "transformer.proj_out".into(),
            reason: "it has no DoRA magnitude while others do; PEFT wants all or none".into()
        }]
    );
    assert_same(&through(&set, LoraFormat::Kohya, &f32_options()), &set);
}
