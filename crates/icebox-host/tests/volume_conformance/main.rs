//! The same checks on every volume driver and every file system that it is meant for.
//!
//! Each test makes its own file system in a file and mounts it in a mount namespace of its own: the test process starts
//! itself again inside `unshare --mount`, so that whatever happens, nothing stays mounted. It ends with a look at what it
//! left behind. Needs root, loop devices, the `mkfs` of the file system and, for qcow2, `qemu-io`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod checks;
mod devices;
mod faults;
mod ground;
mod kill;
mod live;
#[path = "../support/mounts.rs"]
mod mounts;
mod pool;
mod power;
mod volumes;

/// Makes a test of every check, on each of the places.
macro_rules! conformance {
    ($($place:ident: $driver:ident on $file_system:ident,)*) => {
        $(mod $place {
            conformance!(@of $driver on $file_system);
        })*
    };
    (@of Zfs on $file_system:ident) => {
        conformance!(@common Zfs on $file_system:);
    };
    // What is true of drivers that keep disks in files.
    (@of $driver:ident on $file_system:ident) => {
        conformance!(@common $driver on $file_system:
            inv_25_another_uid_cannot_change_what_is_below,
            inv_28_a_full_file_system_is_a_typed_error_without_remains,
            inv_33_unfinished_heads_are_listed_and_go,
        );
    };
    (@common $driver:ident on $file_system:ident: $($check:ident,)*) => {
        conformance!(@checks $driver on $file_system:
            inv_03_a_layer_holds_what_was_written_before_the_freeze,
            inv_09_a_freeze_is_finished_from_wherever_it_stopped,
            inv_24_heads_go_in_any_order,
            inv_25_what_is_below_never_changes,
            inv_25_fifty_heads_leave_a_base_as_it_was,
            inv_26_the_driver_proves_itself_and_leaves_nothing,
            inv_27_sizes_are_what_is_allocated,
            inv_38_forks_share_nothing_they_write,
            a_flattened_disk_is_equal_sparse_and_independent,
            a_head_is_made_once_and_keeps_its_content,
            a_disk_may_be_larger_than_its_base_but_not_smaller,
            what_is_missing_is_named,
            a_deep_chain_reads_right,
            inv_09_inv_25_a_merged_chain_reads_as_before,
            $($check,)*
        );
    };
    (@checks $driver:ident on $file_system:ident: $($check:ident,)*) => {
        $(#[test]
        fn $check() {
            crate::ground::on(
                crate::ground::Driver::$driver,
                crate::ground::FileSystem::$file_system,
                concat!(module_path!(), "::", stringify!($check)),
                |ground| Box::pin(async move {
                    crate::checks::$check(&ground).await;
                    ground
                }),
            );
        })*

        #[test]
        fn inv_32_what_was_reported_done_survives_a_power_cut() {
            crate::ground::on(
                crate::ground::Driver::$driver,
                crate::ground::FileSystem::$file_system,
                concat!(
                    module_path!(),
                    "::inv_32_what_was_reported_done_survives_a_power_cut"
                ),
                |ground| {
                    Box::pin(
                        crate::power::inv_32_what_was_reported_done_survives_a_power_cut(ground),
                    )
                },
            );
        }
    };
}

conformance! {
    dm_snapshot_on_ext4: DmSnapshot on Ext4,
    dm_snapshot_on_xfs: DmSnapshot on Xfs,
    qcow2_on_ext4: Qcow2 on Ext4,
    qcow2_on_xfs: Qcow2 on Xfs,
    reflink_on_xfs: Reflink on Xfs,
    reflink_on_btrfs: Reflink on Btrfs,
    zfs_on_ext4: Zfs on Ext4,
}

/// Makes a test of one check of a module in one place.
macro_rules! only {
    ($module:ident: $($check:ident: $driver:ident on $file_system:ident,)*) => {
        $(#[test]
        fn $check() {
            ground::on(
                ground::Driver::$driver,
                ground::FileSystem::$file_system,
                concat!(module_path!(), "::", stringify!($check)),
                |ground| Box::pin(async move {
                    $module::$check(&ground).await;
                    ground
                }),
            );
        })*
    };
}

only! {
    live:
    inv_03_qemu_switches_to_a_qcow2_head_under_load: Qcow2 on Ext4,
    inv_03_dm_snapshot_freezes_under_an_open_descriptor: DmSnapshot on Ext4,
    inv_52_a_dm_snapshot_chain_is_merged_under_an_attached_disk: DmSnapshot on Ext4,
    inv_03_zfs_freezes_under_an_open_descriptor: Zfs on Ext4,
    inv_25_a_hostile_qcow2_layer_is_refused: Qcow2 on Ext4,
    inv_03_reflink_freezes_under_an_open_descriptor_on_xfs: Reflink on Xfs,
    inv_03_reflink_freezes_under_an_open_descriptor_on_btrfs: Reflink on Btrfs,
    inv_26_reflink_is_refused_on_ext4: Reflink on Ext4,
}

only! {
    devices:
    inv_12_inv_13_dm_snapshot_a_device_in_use_is_an_error_and_all_below_it_stays: DmSnapshot on Ext4,
    inv_14_dm_snapshot_stale_devices_are_replaced_and_no_others: DmSnapshot on Ext4,
    inv_15_dm_snapshot_heads_share_one_origin: DmSnapshot on Ext4,
    inv_21_dm_snapshot_heads_come_while_others_go: DmSnapshot on Ext4,
    inv_30_dm_snapshot_a_freeze_that_was_killed_ends_one_way_or_the_other: DmSnapshot on Ext4,
}

only! {
    volumes:
    inv_12_a_zfs_head_in_use_is_an_error_and_stays: Zfs on Ext4,
    inv_15_two_first_users_import_one_zfs_base: Zfs on Ext4,
    inv_24_zfs_layers_go_in_any_order: Zfs on Ext4,
    inv_25_a_zfs_import_that_was_killed_is_no_base: Zfs on Ext4,
    inv_25_zfs_bases_and_layers_have_no_device: Zfs on Ext4,
    inv_26_a_zfs_pool_that_cannot_be_used_is_a_typed_error: Zfs on Ext4,
    inv_28_a_full_zfs_pool_is_a_typed_error_without_remains: Zfs on Ext4,
    inv_33_what_was_killed_in_a_zfs_pool_is_finished: Zfs on Ext4,
    inv_33_a_zfs_dataset_of_another_data_directory_is_refused: Zfs on Ext4,
    inv_48_what_others_made_in_a_zfs_pool_stays: Zfs on Ext4,
    pauses_and_resumes_leave_few_zfs_volumes: Zfs on Ext4,
}

only! {
    faults:
    inv_03_inv_28_dm_snapshot_a_store_that_fails_is_seen_and_no_layer: DmSnapshot on Ext4,
    inv_14_dm_snapshot_a_foreign_device_of_our_name_is_refused_and_stays: DmSnapshot on Ext4,
    inv_14_dm_snapshot_two_daemons_leave_each_other_alone: DmSnapshot on Ext4,
    inv_15_dm_snapshot_a_base_that_was_deleted_serves_who_has_it_and_nobody_else: DmSnapshot on Ext4,
    inv_15_dm_snapshot_an_attach_without_a_loop_device_leaves_nothing: DmSnapshot on Ext4,
    inv_15_dm_snapshot_users_come_and_go_at_once: DmSnapshot on Ext4,
    inv_28_dm_snapshot_a_base_that_cannot_be_read_is_an_error_of_the_read: DmSnapshot on Ext4,
    inv_28_dm_snapshot_heads_starve_before_they_can_be_lost: DmSnapshot on Ext4,
    inv_28_dm_snapshot_a_full_file_system_is_seen_and_costs_one_head: DmSnapshot on Ext4,
    an_image_that_is_no_whole_number_of_sectors_is_refused_by_dm_snapshot: DmSnapshot on Ext4,
}

only! {
    kill:
    inv_30_dm_snapshot_an_attach_killed_at_any_step_is_done_again: DmSnapshot on Ext4,
    inv_30_dm_snapshot_a_detach_killed_at_any_step_is_done_again: DmSnapshot on Ext4,
    inv_30_dm_snapshot_a_freeze_killed_at_any_step_ends_one_way_or_the_other: DmSnapshot on Ext4,
}
