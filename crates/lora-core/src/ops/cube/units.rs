//! What the units of a cube find out together, in a fixed order.
#![allow(missing_docs)] // of what the macro makes beside each function

use cubecl::prelude::*;

use super::UNITS;

/// The sum of what each unit of a cube has, which all of them get.
#[cube]
pub fn sum_of_units(x: f32) -> f32 {
    of_units(x, true)
}

/// The largest of what each unit of a cube has, which all of them get.
#[cube]
pub fn largest_of_units(x: f32) -> f32 {
    of_units(x, false)
}

/// In a cube of at most [`UNITS`] units half of the numbers is joined with the other half until one is left.
#[cube]
fn of_units(x: f32, #[comptime] is_sum: bool) -> f32 {
    let mut parts = Shared::<[f32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    parts[unit] = x;
    sync_cube();
    let mut half = CUBE_DIM as usize / 2;
    while half > 0 {
        if unit < half {
            let other = parts[unit + half];
            if is_sum {
                parts[unit] += other;
            } else {
                parts[unit] = f32::max(parts[unit], other);
            }
        }
        sync_cube();
        half /= 2;
    }
    let one = parts[0];
    sync_cube(); // the next may lie in the same memory
    one
}
