//! The CPU that guests under KVM see.
//!
//! Its model is a name, and hosts that call theirs the same offer guests different features: by microcode, firmware, the
//! hypervisor around them or their kernel. A guest has looked at its features once and goes by them, so that each has to
//! be there where it is restored. What KVM offers says KVM itself. `/proc/cpuinfo` does not: it lists what the kernel has
//! found for its own use, with names that it makes up.

mod sys;

use std::fs::{self, File};
use std::io;

use icebox_engine::host::CpuFeatures;
use sys::Leaf;

/// The host's CPU model.
pub(crate) fn host_model() -> io::Result<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let name = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, name)| name);
    Ok(format!("host ({name})"))
}

/// What KVM offers guests of the host's CPU.
pub(crate) fn offered_by_kvm() -> io::Result<CpuFeatures> {
    Ok(features(&sys::supported_by_kvm(&File::open("/dev/kvm")?)?))
}

fn features(leaves: &[Leaf]) -> CpuFeatures {
    let mut features = CpuFeatures::default();
    for (function, index, register, names) in WORDS {
        let leaf = leaves
            .iter()
            .find(|leaf| leaf.function == function && leaf.index == index);
        let Some(leaf) = leaf else { continue };
        let word = leaf.registers[register as usize];
        let mut names = names.split_whitespace();
        for bit in 0..u32::BITS {
            let name = match names.next() {
                Some(".") | None => format!("{function:x}.{index:x}.{register:?}.{bit}"),
                Some("-") => continue,
                Some(name) => name.to_owned(),
            };
            if word & (1 << bit) != 0 {
                features.insert(&name);
            }
        }
    }
    features
}

/// Where CPUID puts a word.
#[derive(Clone, Copy, Debug)]
#[expect(non_camel_case_types, reason = "this is how they are written")]
enum Register {
    eax,
    ebx,
    ecx,
    edx,
}
use Register::{eax, ebx, ecx, edx};

/// The words of features, and the name of each bit: Linux's, if it has one; `.` and what is left out are called by where they
/// are; `-` is no feature of its own. Names are in manifests: none that is here is ever changed, nor given to what had none.
const WORDS: [(u32, u32, Register, &str); 14] = [
    (
        0x1,
        0,
        ecx,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm
         . pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave - avx f16c rdrand hypervisor",
    ),
    (
        0x1,
        0,
        edx,
        "fpu vme de pse tsc msr pae mce cx8 apic . sep mtrr pge mca cmov
         pat pse36 pn clflush . dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    (
        0x7,
        0,
        ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 . smep bmi2 erms invpcid rtm cqm . mpx rdt_a
         avx512f avx512dq rdseed adx smap avx512ifma . clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    (
        0x7,
        0,
        ecx,
        ". avx512vbmi umip pku - waitpkg avx512_vbmi2 user_shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq .
         la57 . . . . . rdpid . bus_lock_detect cldemote . movdiri movdir64b enqcmd sgx_lc pks",
    ),
    (
        0x7,
        0,
        edx,
        ". . avx512_4vnniw avx512_4fmaps fsrm . . . avx512_vp2intersect . md_clear . . . serialize .
         tsxldtrk . pconfig arch_lbr ibt . amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities . spec_ctrl_ssbd",
    ),
    (0x7, 1, eax, ". . . . avx_vnni avx512_bf16"),
    (0x7, 1, edx, ""),
    // What of a guest's state `xsave` saves.
    (0xd, 0, eax, ""),
    (0xd, 1, eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        0x8000_0001,
        0,
        ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt . lwp
         fma4 tce . nodeid_msr . tbm topoext perfctr_core perfctr_nb . bpext ptsc perfctr_llc mwaitx",
    ),
    // AMD repeats most of leaf 1 in it.
    (
        0x8000_0001,
        0,
        edx,
        "- - - - - - - - - - - syscall - - - - - - . mp nx . mmxext - - fxsr_opt pdpe1gb rdtscp . lm 3dnowext 3dnow",
    ),
    (
        0x8000_0008,
        0,
        ebx,
        "clzero irperf xsaveerptr . rdpru . . . . wbnoinvd . . ibpb . ibrs stibp
         . . . . . . . . ssbd virt_ssbd . . amd_psfd",
    ),
    (0x8000_0021, 0, eax, ""),
    // What KVM adds to any CPU.
    (
        0x4000_0001,
        0,
        eax,
        "kvm_clock kvm_nop_io_delay . kvm_clock2 kvm_async_pf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> Leaf {
        Leaf {
            function,
            index,
            registers,
        }
    }

    #[test]
    fn inv_44_features_have_names_that_stay() {
        for (function, index, register, names) in WORDS {
            let names = names.split_whitespace().count();
            assert!(names <= 32, "{function:x}.{index:x}.{register:?}: {names}");
        }
        let found = features(&[
            leaf(1, 0, [!0, !0, 1 << 28 | 1 << 27 | 1 << 31, 1 << 26]),
            leaf(7, 0, [0, 1 << 16 | 1 << 6, 1 << 1, 1 << 24]),
            leaf(7, 1, [1 << 5 | 1 << 31, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, 0, 1 | 1 << 29]),
            leaf(0x4000_0001, 0, [1 << 24 | 1 << 3, 0, 0, 0]),
        ]);
        assert_eq!(
            found.to_string(),
            "40000001.0.eax.24 7.0.ebx.6 7.1.eax.31 amx_tile avx avx512_bf16 avx512f avx512vbmi hypervisor kvm_clock2 lm sse2"
        );
        let names = |words: &[(u32, u32, Register, &str)]| {
            let every = words.iter().flat_map(|it| it.3.split_whitespace());
            let mut every: Vec<_> = every.filter(|name| !matches!(*name, "." | "-")).collect();
            every.sort_unstable();
            every.into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        let mut once = names(&WORDS);
        once.dedup();
        assert_eq!(once, names(&WORDS), "no name means two bits");
    }

    #[test]
    fn inv_44_kvm_says_what_it_offers_guests() {
        if let Err(why) = crate::vmm::trial::kvm_opens() {
            return crate::skip::skip_this(&why);
        }
        let offered = offered_by_kvm().unwrap().to_string();
        let offered: Vec<_> = offered.split(' ').collect();
        for every_guest_has in ["fpu", "sse2", "lm", "nx"] {
            assert!(offered.contains(&every_guest_has), "{offered:?}");
        }
    }
}
