use half::prelude::*;

use super::*;
use proptest::prelude::*;

fn tensor(dtype: Dtype, shape: &[usize], bytes: &[u8]) -> HostTensor {
    HostTensor {
        dtype,
        shape: shape.to_vec(),
        bytes: bytes.to_vec(),
    }
}

fn f64s(values: &[f64]) -> HostTensor {
    HostTensor::from_values(Dtype::F64, vec![values.len()], values, f64::to_le_bytes)
}

/// Elements `0, 1, 2, ..` of any dtype, as raw bits.
fn counting(dtype: Dtype, shape: &[usize]) -> HostTensor {
    let count = shape.iter().product::<usize>() as u64;
    let bytes = (0..count)
        .flat_map(|i| i.to_le_bytes()[..dtype.size()].to_vec())
        .collect::<Vec<_>>();
    tensor(dtype, shape, &bytes)
}

#[test]
fn dtype_names_are_those_of_the_safetensors_crate() {
    for dtype in Dtype::ALL {
        let json = format!("\"{}\"", dtype.name());
        let theirs: safetensors::Dtype = serde_json::from_str(&json).expect("a known dtype");
        assert_eq!(theirs.bitsize(), 8 * dtype.size());
        assert_eq!(theirs.to_string(), dtype.name());
        assert_eq!(Dtype::parse(dtype.name()), Some(dtype));
    }
    assert_eq!(Dtype::parse("f32"), None);
    assert_eq!(Dtype::parse("F4"), None);
}

#[test]
fn e4m3_has_the_published_values() {
    // Table 1 of arXiv:2209.05433.
    for (code, value) in [
        (0x00, 0.0),
        (0x01, 2f32.powi(-9)),
        (0x07, 0.875 * 2f32.powi(-6)),
        (0x08, 2f32.powi(-6)),
        (0x38, 1.0),
        (0xB8, -1.0),
        (0x3F, 1.875),
        (0x7E, 448.0),
        (0xFE, -448.0),
        (0x81, -(2f32.powi(-9))),
    ] {
        assert_eq!(tensor(Dtype::F8E4m3, &[1], &[code]).to_f32(), [value]);
    }
    let all = tensor(Dtype::F8E4m3, &[256], &Vec::from_iter(0..=255)).to_f32();
    let nan = (0..256).filter(|&i| all[i].is_nan()).collect::<Vec<_>>();
    assert_eq!(nan, [0x7F, 0xFF]);
    assert!(all.iter().all(|value| !value.is_infinite()));
    assert!(all[..0x7F].is_sorted());
    assert!(all[0x80].is_sign_negative());
}

#[test]
fn e5m2_is_the_upper_half_of_f16() {
    let all = tensor(Dtype::F8E5m2, &[256], &Vec::from_iter(0..=255)).to_f32();
    for (code, value) in (0u16..).zip(all) {
        let reference = f16::from_bits(code << 8).to_f32();
        assert!(value.to_bits() == reference.to_bits() || value.is_nan() && reference.is_nan());
    }
}

#[test]
fn every_dtype_converts() {
    let one = |dtype| match dtype {
        Dtype::F64 => 1f64.to_le_bytes().to_vec(),
        Dtype::F32 => 1f32.to_le_bytes().to_vec(),
        Dtype::F16 => f16::ONE.to_le_bytes().to_vec(),
        Dtype::Bf16 => bf16::ONE.to_le_bytes().to_vec(),
        Dtype::F8E4m3 => vec![0x38],
        Dtype::F8E5m2 => vec![0x3C],
        _ => 1u64.to_le_bytes()[..dtype.size()].to_vec(),
    };
    for dtype in Dtype::ALL {
        // Longer than any block, and not a multiple of one.
        let ones = tensor(dtype, &[3001], &one(dtype).repeat(3001));
        assert_eq!(ones.to_f32(), vec![1.0; 3001], "{dtype}");
        assert_eq!(ones.to_f64(), vec![1.0; 3001], "{dtype}");
        let integers = (!dtype.is_float()).then(|| vec![1; 3001]);
        assert_eq!(ones.to_i64(), integers, "{dtype}");
        assert_eq!(ones.first_non_finite(), None);
        for target in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let cast = ones.cast(target);
            assert_eq!(cast, tensor(target, &[3001], &one(target).repeat(3001)));
        }
    }
}

#[test]
fn integers_keep_their_sign_and_range() {
    assert_eq!(
        HostTensor::from_i64([2], &[i64::MIN, -1]).to_i64(),
        Some(vec![i64::MIN, -1])
    );
    assert_eq!(tensor(Dtype::I8, &[1], &[0xFF]).to_i64(), Some(vec![-1]));
    assert_eq!(tensor(Dtype::U8, &[1], &[0xFF]).to_i64(), Some(vec![255]));
    assert_eq!(tensor(Dtype::Bool, &[1], &[7]).to_i64(), Some(vec![1]));
    assert_eq!(tensor(Dtype::U64, &[1], &[0xFF; 8]).to_i64(), None);
    assert_eq!(
        tensor(Dtype::U64, &[1], &[0xFF; 8]).to_f32(),
        [2f32.powi(64)]
    );
}

#[test]
fn scalars_and_empty_tensors_convert() {
    let scalar = HostTensor::from_f32([], &[2.5]);
    assert_eq!((scalar.numel(), scalar.to_f32()), (1, vec![2.5]));
    assert_eq!(scalar.cast(Dtype::Bf16).to_f32(), [2.5]);
    let empty = HostTensor::from_f32([0, 3], &[]);
    assert_eq!(empty.cast(Dtype::F16).to_f64(), [0.0; 0]);
    assert_eq!(empty.transposed().shape, [3, 0]);
    assert_eq!(empty.rows(0..0), empty);
}

#[test]
fn a_cast_from_f64_rounds_once() {
    let tie = 1.0 + 2f64.powi(-8); // half way between two bf16
    let values = [
        tie,
        tie + 2f64.powi(-40),
        tie - 2f64.powi(-40),
        -tie - 2f64.powi(-40),
    ];
    let above = 1.0 + 2f32.powi(-7);
    assert_eq!(
        f64s(&values).cast(Dtype::Bf16).to_f32(),
        [1.0, above, 1.0, -above]
    );
    let tie = 1.0 + 2f64.powi(-11);
    assert_eq!(
        f64s(&[tie, tie + 2f64.powi(-40)]).cast(Dtype::F16).to_f32(),
        [1.0, 1.0 + 2f32.powi(-10)]
    );
    let values = [1e300, -1e300, 1e-300, -1e-300, f64::NAN, f64::INFINITY];
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        let cast = f64s(&values).cast(dtype).to_f32();
        assert_eq!(cast[..4], [f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0]);
        assert!(cast[4].is_nan() && cast[5] == f32::INFINITY);
    }
}

#[test]
#[should_panic(expected = "cannot cast F32 to I8")]
fn a_cast_to_integers_is_refused() {
    HostTensor::from_f32([0], &[]).cast(Dtype::I8);
}

#[test]
#[should_panic(expected = "shape [2, 2] and values differ")]
fn values_must_fill_the_shape() {
    HostTensor::from_f32([2, 2], &[0.0; 3]);
}

#[test]
fn transposing_moves_every_element() {
    for dtype in [Dtype::U8, Dtype::Bf16, Dtype::F32, Dtype::I64] {
        for (rows, columns) in [(1, 1), (2, 3), (64, 64), (65, 130), (1, 200)] {
            let before = counting(dtype, &[rows, columns]);
            let after = before.transposed();
            assert_eq!(after.shape, [columns, rows]);
            let size = dtype.size();
            for i in 0..rows * columns {
                let j = i % columns * rows + i / columns;
                assert_eq!(
                    after.bytes[j * size..][..size],
                    before.bytes[i * size..][..size]
                );
            }
            assert_eq!(after.transposed(), before);
        }
    }
}

#[test]
#[should_panic(expected = "needs two axes, found [2, 2, 2]")]
fn transposing_needs_two_axes() {
    counting(Dtype::U8, &[2, 2, 2]).transposed();
}

#[test]
fn rows_slice_the_outermost_axis() {
    let rows = counting(Dtype::I64, &[4, 2, 3]).rows(1..3);
    assert_eq!(rows.shape, [2, 2, 3]);
    assert_eq!(rows.to_i64(), Some(Vec::from_iter(6..18)));
}

#[test]
fn the_first_non_finite_element_is_found() {
    for (dtype, codes) in [
        (
            Dtype::F64,
            vec![f64::NAN.to_bits(), f64::NEG_INFINITY.to_bits()],
        ),
        (Dtype::F32, vec![0x7F80_0001, 0xFF80_0000]),
        (Dtype::F16, vec![0x7C00, 0xFE00]),
        (Dtype::Bf16, vec![0x7F80, 0xFFC0]),
        (Dtype::F8E4m3, vec![0x7F, 0xFF]),
        (Dtype::F8E5m2, vec![0x7C, 0xFF]),
    ] {
        for code in codes {
            let size = dtype.size();
            let mut values = tensor(dtype, &[3000], &vec![0; 3000 * size]);
            for i in [2999, 1500] {
                values.bytes[i * size..][..size].copy_from_slice(&code.to_le_bytes()[..size]);
                assert_eq!(values.first_non_finite(), Some(i), "{dtype} {code:#x}");
            }
        }
    }
    assert_eq!(tensor(Dtype::U8, &[1], &[0xFF]).first_non_finite(), None);
}

proptest! {
    #[test]
    fn narrow_floats_agree_with_half(bits: Vec<u32>) {
        let values = Vec::from_iter(bits.iter().map(|&bits| f32::from_bits(bits)));
        let single = HostTensor::from_f32([values.len()], &values);
        let to_bf16 = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes());
        prop_assert_eq!(single.cast(Dtype::Bf16).bytes, Vec::from_iter(to_bf16));
        let to_f16 = values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes());
        prop_assert_eq!(single.cast(Dtype::F16).bytes, Vec::from_iter(to_f16));
    }

    #[test]
    fn narrowing_an_f64_that_is_an_f32_rounds_like_the_f32(bits: u32) {
        let value = f32::from_bits(bits);
        prop_assume!(!value.is_nan());
        let single = HostTensor::from_f32([1], &[value]);
        for dtype in [Dtype::F16, Dtype::Bf16] {
            prop_assert_eq!(f64s(&[value.into()]).cast(dtype), single.cast(dtype));
        }
    }

    #[test]
    fn widening_loses_nothing(bytes: Vec<[u8; 2]>) {
        for dtype in [Dtype::F16, Dtype::Bf16] {
            let narrow = tensor(dtype, &[bytes.len()], bytes.as_flattened());
            prop_assume!(narrow.first_non_finite().is_none());
            prop_assert_eq!(&narrow.cast(Dtype::F32).cast(dtype), &narrow);
            prop_assert_eq!(&narrow.cast(Dtype::F64).cast(dtype), &narrow);
        }
    }
}
