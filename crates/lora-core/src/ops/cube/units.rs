//! What the units of a cube find out together, in a fixed order.
#![allow(missing_docs)] // of what the macro makes beside each function

use cubecl::prelude::*;

use super::UNITS;

/// The sum of what each unit of a cube of at most [`UNITS`](super::UNITS) has, which all of them get: half of the numbers is added to the
/// other half until one is left.
#[cube]
pub fn sum_of_units(x: f32) -> f32 {
    let mut parts = Shared::<[f32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    parts[unit] = x;
    sync_cube();
    let mut half = CUBE_DIM as usize / 2;
    while half > 0 {
        if unit < half {
            let other = parts[unit + half];
            parts[unit] += other;
        }
        sync_cube();
        half /= 2;
    }
    let sum = parts[0];
    sync_cube(); // the next sum may lie in the same memory
    sum
}

/// The largest of what each unit of a cube of at most [`UNITS`](super::UNITS) has.
#[cube]
pub fn largest_of_units(x: f32) -> f32 {
    let mut parts = Shared::<[f32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    parts[unit] = x;
    sync_cube();
    let mut half = CUBE_DIM as usize / 2;
    while half > 0 {
        if unit < half {
            let other = parts[unit + half];
            parts[unit] = f32::max(parts[unit], other);
        }
        sync_cube();
        half /= 2;
    }
    let largest = parts[0];
    sync_cube(); // the next may lie in the same memory
    largest
}
