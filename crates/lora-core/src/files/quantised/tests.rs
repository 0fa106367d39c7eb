use std::collections::BTreeMap;
use std::path::Path;

use super::encode::{NF4, dynamic_map};
use super::*;
use crate::files::host::{Dtype, HostTensor};
use crate::files::safetensors::{TensorFile, TensorSet, serialize};

/// What bitsandbytes itself made: tests/reference/quantised.py.
fn bitsandbytes() -> TensorSet {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    TensorSet::open(&root.join("tests/fixtures/quantised/bitsandbytes.safetensors"))
        .expect("the fixture")
}

fn set(tensors: BTreeMap<String, HostTensor>) -> TensorSet {
    let bytes = serialize(&tensors, &BTreeMap::new());
    TensorSet::from_file(TensorFile::from_bytes(Path::new("memory"), bytes).expect("sound"))
}

fn values(set: &TensorSet, name: &str) -> Vec<f32> {
    set.read(name).expect(name).to_f32()
}

#[test]
fn every_form_of_bitsandbytes_is_decoded_as_by_itself() {
    let set = bitsandbytes();
    let all = Stored::all(&set).expect("readable");
    assert_eq!(all.len(), 8);
    for (name, stored) in all {
        let form = name.strip_suffix(".weight").expect("a weight");
        let info = set.info(&format!("{form}.expected")).expect("expected");
        assert_eq!(stored.shape(), info.shape, "{name}");
        let decoded = stored.read(&set, None).expect("sound");
        let expected = values(&set, &format!("{form}.expected"));
        for (found, expected) in decoded.to_f32().iter().zip(&expected) {
            assert!(
                (found - expected).abs() <= 2e-7 * expected.abs(),
                "{name}: {found}, not {expected}"
            );
        }
    }
}

#[test]
fn a_slice_of_rows_is_these_rows() {
    let set = bitsandbytes();
    for (name, stored) in Stored::all(&set).expect("readable") {
        let whole = stored.read(&set, None).expect("sound");
        let [height, width] = [whole.shape()[0], whole.shape()[1]];
        let all = whole.to_f32();
        for rows in [0..height, 1..3, 3..height, height - 1..height, 2..2] {
            let part = stored.read(&set, Some(rows.clone())).expect("sound");
            assert_eq!(part.shape(), [rows.len(), width], "{name}");
            let expected = &all[rows.start * width..rows.end * width];
            assert_eq!(part.to_f32(), expected, "{name} {rows:?}");
            if rows.len() > 1 {
                let inner = part.rows(1..rows.len());
                assert_eq!(inner.to_f32(), &expected[width..], "{name} {rows:?}");
            }
        }
        let beyond = stored.read(&set, Some(0..height + 1));
        assert!(beyond.expect_err("refused").to_string().contains("no rows"));
    }
}

#[test]
fn codes_are_decoded_on_a_device_as_on_the_host() {
    decoded_as_on_the_host(&Device::flex());
}

#[cfg(feature = "wgpu")]
#[test]
fn codes_are_decoded_on_wgpu_as_on_the_host() {
    let device = Device::enumerate(burn::tensor::DeviceType::Wgpu).into_vec();
    decoded_as_on_the_host(device.first().expect("a device"));
}

fn decoded_as_on_the_host(device: &Device) {
    let same = |weight: Quantised, what: &str| {
        let Some(codes) = weight.on_device(device) else {
            assert!(!device.supports_dtype(DType::BF16), "{what}");
            return;
        };
        let dense = codes.dense().transpose();
        assert_eq!(dense.dims(), weight.shape(), "{what}");
        let found: Vec<f32> = dense.into_data().try_into_vec().expect("f32");
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(&weight.to_f32()), "{what}");
    };
    let set = bitsandbytes();
    for (name, stored) in Stored::all(&set).expect("readable") {
        let whole = stored.read(&set, None).expect("sound");
        let height = whole.shape()[0];
        for rows in [1..3, 3..height, height - 1..height] {
            same(whole.rows(rows.clone()), &format!("{name} {rows:?}"));
        }
        same(whole, &name);
    }
    let values: Vec<f32> = (0..5 * 67).map(|i| (i as f32 * 0.37).sin()).collect();
    for encode in [Quantised::nf4, Quantised::int8, Quantised::fp8] {
        same(encode([5, 67], &values), "encoded");
    }
}

#[test]
fn nf4_is_encoded_as_by_bitsandbytes() {
    let set = bitsandbytes();
    assert_eq!(values(&set, "nf4_plain.weight.quant_map"), NF4);
    for (own, expected) in dynamic_map().iter().zip(values(&set, "dynamic_map")) {
        assert!((own - expected).abs() <= 2e-7 * expected.abs()); // a file brings its own map
    }
    for form in ["nf4_double", "nf4_wide"] {
        let source = set.read(&format!("{form}.source")).expect("there");
        let own = Quantised::nf4(source.shape.clone(), &source.to_f32());
        let codes = set.read(&format!("{form}.weight")).expect("there");
        assert_eq!(own.codes, codes.bytes, "{form}");
        let expected = values(&set, &format!("{form}.expected"));
        let pairs = own.to_f32().into_iter().zip(expected);
        let distances =
            pairs.map(|(own, expected)| (own - expected).abs() / expected.abs().max(1e-3));
        let distances: Vec<f32> = distances.collect();
        // bitsandbytes finds the code of a factor by a table, which may miss the nearest by one
        assert!(distances.iter().all(|&distance| distance < 0.01), "{form}");
        let other = distances
            .iter()
            .filter(|&&distance| distance > 1e-5)
            .count();
        assert!(
            other * 10 < distances.len(),
            "{form}: {other} of {}",
            distances.len()
        );
        let bits = own.bytes() as f64 * 8.0 / own.numel() as f64;
        assert!(bits < 4.2, "{form}: {bits} bits an element");
    }
}

#[test]
fn what_is_encoded_is_near_to_what_was() {
    let set = bitsandbytes();
    let source = set.read("nf4_wide.source").expect("there");
    let (shape, source) = (source.shape.clone(), source.to_f32());
    let error = |own: Quantised| {
        let own = own.to_f32();
        let square = |x: f32| f64::from(x) * f64::from(x);
        let distance: f64 = own.iter().zip(&source).map(|(a, b)| square(a - b)).sum();
        (distance / source.iter().map(|&b| square(b)).sum::<f64>()).sqrt()
    };
    let (eight, float, four) = (
        error(Quantised::int8(shape.clone(), &source)),
        error(Quantised::fp8(shape.clone(), &source)),
        error(Quantised::nf4(shape, &source)),
    );
    assert!((0.01..0.04).contains(&float), "{float}");
    assert!((0.001..0.008).contains(&eight), "{eight}");
    assert!((0.05..0.11).contains(&four), "{four}");
    for zeros in [0, 1, 63, 64, 65] {
        let zeros = vec![0.0; zeros];
        assert_eq!(Quantised::nf4([zeros.len()], &zeros).to_f32(), zeros);
        assert_eq!(Quantised::int8([zeros.len()], &zeros).to_f32(), zeros);
        assert_eq!(Quantised::fp8([zeros.len()], &zeros).to_f32(), zeros);
    }
    let all: Vec<u8> = (0..=255).filter(|code| code & 0x7f != 0x7f).collect();
    let numbers = fp8([1, all.len()], &all).to_f32();
    assert_eq!(Quantised::fp8([all.len()], &numbers).codes, all);
    let between = [448.0, 17.0, 19.0, -17.5, 0.0009]; // 16, 18, 20: halfway goes to the even code
    let found = Quantised::fp8([5], &between).to_f32();
    assert_eq!(found, [448.0, 16.0, 20.0, -18.0, 0.0]);
}

fn fp8(shape: [usize; 2], codes: &[u8]) -> HostTensor {
    HostTensor {
        dtype: Dtype::F8E4m3,
        shape: shape.to_vec(),
        bytes: codes.to_vec(),
    }
}

#[test]
fn fp8_is_scaled_as_a_whole_or_by_row() {
    // 0x38 is 1, 0x3c is 1.5, 0xb8 is -1
    let codes = fp8([2, 2], &[0x38, 0x3c, 0xb8, 0x38]);
    for (name, scales, expected) in [
        ("x.scale_weight", vec![2.0], [2.0, 3.0, -2.0, 2.0]),
        ("x.weight_scale", vec![2.0, 4.0], [2.0, 3.0, -4.0, 4.0]),
        ("y.weight_scale", vec![2.0], [1.0, 1.5, -1.0, 1.0]),
    ] {
        let scales = HostTensor::from_f32([scales.len()], &scales);
        let tensors = [("x.weight", codes.clone()), (name, scales)];
        let set = set(tensors.map(|(name, t)| (name.into(), t)).into());
        let all = Stored::all(&set).expect("readable");
        let whole = all["x.weight"].read(&set, None).expect("sound");
        assert_eq!(whole.to_f32(), expected, "{name}");
        let row = all["x.weight"].read(&set, Some(1..2)).expect("sound");
        assert_eq!(row.to_f32(), expected[2..], "{name}");
    }
}

#[test]
fn what_cannot_be_read_is_said() {
    let json = |text: &str| HostTensor {
        dtype: Dtype::U8,
        shape: vec![text.len()],
        bytes: text.as_bytes().to_vec(),
    };
    let f32s = |n: usize| HostTensor::from_f32([n], &vec![1.0; n]);
    let bytes = |n: usize, dtype| HostTensor {
        dtype,
        shape: vec![n],
        bytes: vec![1; n],
    };
    let state = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 32]}"#;
    let key = "x.weight.quant_state.bitsandbytes__nf4";
    let base = || {
        BTreeMap::from([
            ("x.weight".to_string(), bytes(64, Dtype::U8)),
            ("x.weight.absmax".into(), f32s(2)),
            ("x.weight.quant_map".into(), f32s(16)),
            (key.into(), json(state)),
        ])
    };
    let message = |tensors: BTreeMap<String, HostTensor>| {
        let set = set(tensors);
        let read = || Stored::all(&set)?["x.weight"].read(&set, None);
        read().expect_err("refused").to_string()
    };
    let with = |name: &str, tensor: HostTensor| {
        let mut tensors = base();
        tensors.insert(name.into(), tensor);
        message(tensors)
    };
    let without = |name: &str| {
        let mut tensors = base();
        tensors.remove(name);
        message(tensors)
    };
    for (message, says) in [
        (with("x.weight", bytes(63, Dtype::U8)), "63 bytes of codes"),
        (with("x.weight.absmax", f32s(3)), "3 factors"),
        (
            with("x.weight.absmax", bytes(2, Dtype::U8)),
            "`nested_absmax` is missing",
        ),
        (
            with("x.weight.nested_absmax", f32s(1)),
            "lacks what `nested_absmax` needs",
        ),
        (with("x.weight.quant_map", f32s(15)), "has not 16 values"),
        (message(base()), "is not the table of bitsandbytes' NF4"),
        (with(key, json("{")), "malformed"),
        (
            with(key, json(&state.replace("float32", "int8"))),
            "`int8` is not known",
        ),
        (with(key, json(&state.replace("64", "0"))), "blocks have 0"),
        (
            with(
                key,
                json(&state.replace("4, 32", "4, 18446744073709551615")),
            ),
            "overflows",
        ),
        (without("x.weight.quant_map"), "does not exist"),
        (without(key), "no tensor beside it says"),
    ] {
        assert!(message.contains(says), "{message}");
    }
    let integers = |name: &str, part: HostTensor| {
        let weight = HostTensor {
            shape: vec![2, 2],
            ..bytes(4, Dtype::I8)
        };
        let scale = HostTensor::from_f32([2], &[1.0, 2.0]);
        message(BTreeMap::from([
            ("x.weight".to_string(), weight),
            ("x.SCB".into(), scale),
            (name.into(), part),
        ]))
    };
    for (message, says) in [
        (
            integers("x.weight_format", bytes(1, Dtype::U8)),
            "laid it out for a GPU",
        ),
        (
            integers("x.comfy_quant", json(r#"{"format": "nvfp4"}"#)),
            "`nvfp4` is not read",
        ),
        (integers("x.SCB", f32s(3)), "3 scales are there, for 2 rows"),
    ] {
        assert!(message.contains(says), "{message}");
    }
}
