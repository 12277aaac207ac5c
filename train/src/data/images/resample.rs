//! Resizing as Pillow does it, bit for bit: two passes with filters that are stretched when the image shrinks, each rounded to bytes.

use serde::Deserialize;

use super::picture::Picture;

/// Filters by Pillow's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u64")]
pub enum Filter {
    /// The nearest pixel.
    Nearest,
    /// Sinc of width 3.
    Lanczos,
    /// Linear.
    Bilinear,
    /// Cubic with slope -1/2 at 1.
    Bicubic,
    /// Mean of an area.
    Box,
    /// Windowed sinc of width 1.
    Hamming,
}

impl TryFrom<u64> for Filter {
    type Error = String;

    fn try_from(number: u64) -> Result<Self, String> {
        let all = [Self::Nearest, Self::Lanczos, Self::Bilinear, Self::Bicubic, Self::Box, Self::Hamming];
        let found = usize::try_from(number).ok().and_then(|number| all.get(number));
        found.copied().ok_or_else(|| format!("{number} is no filter of Pillow; the filters are 0 to 5"))
    }
}

impl Filter {
    /// Largest distance with a weight.
    fn support(self) -> f64 {
        match self {
            Self::Nearest | Self::Box => 0.5,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
        let far = x.abs();
        match self {
            Self::Nearest | Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - far).max(0.0),
            Self::Hamming if far >= 1.0 => 0.0,
            Self::Hamming => sinc(far) * (0.54 + 0.46 * (far * std::f64::consts::PI).cos()),
            Self::Bicubic if far < 1.0 => ((-0.5 + 2.0) * far - (-0.5 + 3.0)) * far * far + 1.0,
            Self::Bicubic if far < 2.0 => (((far - 5.0) * far + 8.0) * far - 4.0) * -0.5,
            Self::Bicubic => 0.0,
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}

/// Bits of the fractions of weights.
const BITS: u32 = 32 - 8 - 2;

/// Weights of one output pixel: the first input pixel, and the weights from there on.
type Weights = (usize, Vec<i32>);

fn weights(filter: Filter, from: usize, to: usize) -> Vec<Weights> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let of = |pixel: usize| {
        let centre = (pixel as f64 + 0.5) * scale;
        let first = ((centre - support + 0.5) as isize).max(0) as usize;
        let end = ((centre + support + 0.5) as usize).min(from);
        let at = |input: usize| filter.weight((input as f64 - centre + 0.5) * (1.0 / stretch));
        let raw: Vec<f64> = (first..end).map(at).collect();
        let sum: f64 = raw.iter().sum();
        let whole = |weight: f64| {
            let weight = if sum == 0.0 { weight } else { weight / sum };
            let scaled = weight * f64::from(1u32 << BITS);
            (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
        };
        (first, raw.into_iter().map(whole).collect())
    };
    (0..to).map(of).collect()
}

/// A picture of another size.
pub fn resized(picture: &Picture, width: usize, height: usize, filter: Filter) -> Picture {
    if filter == Filter::Nearest {
        let [columns, rows] = [nearest(picture.width, width), nearest(picture.height, height)];
        let mut pixels = Vec::with_capacity(3 * width * height);
        for row in rows {
            columns.iter().for_each(|column| pixels.extend(picture.at(*column, row)));
        }
        return Picture { width, height, pixels };
    }
    // The intermediate bytes are rounded, so that the order of the passes shows. It is Pillow's since version 13.
    let (less_high, less_wide) = (picture.height as i64 - height as i64, picture.width as i64 - width as i64);
    match less_high > 0 && 2 * less_wide < less_high {
        true => across(&down(picture, height, filter), width, filter),
        false => down(&across(picture, width, filter), height, filter),
    }
}

/// Nearest input pixel of each output pixel.
///
/// Pillow adds the scale up pixel by pixel, and its rounding decides between two pixels that are equally near.
fn nearest(from: usize, to: usize) -> Vec<usize> {
    let scale = from as f64 / to as f64;
    let centres = std::iter::successors(Some(scale * 0.5), |centre| Some(centre + scale));
    centres.take(to).map(|centre| (centre as usize).min(from - 1)).collect()
}

/// A picture of another width.
fn across(picture: &Picture, width: usize, filter: Filter) -> Picture {
    if width == picture.width {
        return picture.clone();
    }
    let weights = weights(filter, picture.width, width);
    let rows = (0..picture.height).flat_map(|y| {
        let row = &picture.pixels[3 * y * picture.width..3 * (y + 1) * picture.width];
        weights.iter().flat_map(move |weights| mixed(weights, |input| &row[3 * input..3 * input + 3]))
    });
    Picture { width, height: picture.height, pixels: rows.collect() }
}

/// A picture of another height.
fn down(picture: &Picture, height: usize, filter: Filter) -> Picture {
    if height == picture.height {
        return picture.clone();
    }
    let width = picture.width;
    let rows = weights(filter, picture.height, height);
    let pixels = rows.iter().flat_map(|weights| {
        (0..width).flat_map(move |x| {
            mixed(weights, |input| &picture.pixels[3 * (input * width + x)..3 * (input * width + x) + 3])
        })
    });
    Picture { width, height, pixels: pixels.collect() }
}

/// Weighted sum of pixels, rounded and kept within a byte.
fn mixed<'a>((first, weights): &Weights, pixel: impl Fn(usize) -> &'a [u8]) -> [u8; 3] {
    let mut sums = [1i32 << (BITS - 1); 3];
    for (place, weight) in weights.iter().enumerate() {
        for (sum, value) in sums.iter_mut().zip(pixel(first + place)) {
            *sum = sum.wrapping_add(i32::from(*value) * weight);
        }
    }
    sums.map(|sum| (sum >> BITS).clamp(0, 255) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(width: usize, height: usize) -> Picture {
        let value = |i: usize| ((i * i * 31 + i * 7) % 251) as u8;
        Picture { width, height, pixels: (0..3 * width * height).map(value).collect() }
    }

    /// Sums of the bytes and of the bytes times their place, as Pillow 13.0 gives them for the same picture.
    fn sums(picture: &Picture) -> (u64, u64) {
        let bytes = || picture.pixels.iter().map(|byte| u64::from(*byte));
        (bytes().sum(), bytes().enumerate().map(|(place, byte)| place as u64 * byte).sum())
    }

    #[test]
    fn every_filter_gives_pillows_bytes() {
        for (size, expected) in PILLOW {
            let picture = pattern(size[0], size[1]);
            for (number, expected) in expected.iter().enumerate() {
                let filter = Filter::try_from(number as u64).unwrap();
                let found = resized(&picture, size[2], size[3], filter);
                assert_eq!((found.width, found.height), (size[2], size[3]));
                assert_eq!(sums(&found), *expected, "{filter:?} of {size:?}");
            }
        }
        assert!(Filter::try_from(6).is_err());
    }

    /// Sizes before and after, and the sums for each filter.
    type Case = ([usize; 4], [(u64, u64); 6]);

    /// `Image.frombytes("RGB", size, pattern).resize(to, filter)` for the filters 0 to 5.
    const PILLOW: &[Case] = &[
        (
            [13, 9, 5, 4],
            [(7230, 214210), (7416, 217657), (7410, 217972), (7411, 217944), (7391, 221283), (7435, 220520)],
        ),
        (
            [4, 3, 11, 7],
            [
                (24343, 3250814),
                (24311, 3329615),
                (24180, 3263854),
                (24285, 3315864),
                (24343, 3250814),
                (24221, 3282471),
            ],
        ),
        (
            [7, 20, 7, 6],
            [(15181, 949731), (15849, 1006063), (15848, 1003447), (15834, 1004519), (15492, 989646), (15730, 995799)],
        ),
        (
            [16, 5, 3, 5],
            [(5745, 121592), (5441, 118023), (5452, 118285), (5444, 118143), (5475, 119773), (5441, 117766)],
        ),
        ([1, 1, 4, 4], [(2816, 68384), (2816, 68384), (2816, 68384), (2816, 68384), (2816, 68384), (2816, 68384)]),
        (
            [30, 40, 12, 12],
            [
                (51235, 11276846),
                (52684, 11330424),
                (52680, 11330430),
                (52688, 11334511),
                (52785, 11358369),
                (52638, 11349094),
            ],
        ),
        (
            [17, 33, 21, 21],
            [
                (158016, 105433226),
                (162311, 107581707),
                (161982, 107336435),
                (162243, 107541473),
                (160308, 106378379),
                (161654, 107332007),
            ],
        ),
        (
            [20, 33, 16, 24],
            [
                (140119, 81866449),
                (140686, 80931905),
                (140740, 80912667),
                (140667, 80934103),
                (140628, 80977661),
                (140423, 81008272),
            ],
        ),
        (
            [21, 33, 16, 24],
            [
                (138907, 81880097),
                (140395, 80547263),
                (140266, 80370325),
                (140368, 80552309),
                (141181, 82201414),
                (140510, 81169433),
            ],
        ),
        (
            [6, 6, 6, 6],
            [(13737, 812089), (13737, 812089), (13737, 812089), (13737, 812089), (13737, 812089), (13737, 812089)],
        ),
        // Pixels that are equally near: the rounding of the centres decides.
        (
            [4, 10, 15, 37],
            [
                (211385, 191110519),
                (211724, 190936001),
                (211844, 191109184),
                (211716, 191128277),
                (210635, 189675241),
                (211781, 191083599),
            ],
        ),
        (
            [10, 4, 37, 22],
            [
                (312170, 409309668),
                (309507, 408640540),
                (310521, 408215885),
                (310131, 409264387),
                (313674, 412169058),
                (310603, 408759074),
            ],
        ),
    ];
}
