/* choice.h: tables whose ops come from two levels of the CPU, each at each shape from the faster one. */
#ifndef GPT_CHOICE_H
#define GPT_CHOICE_H

#include "ops.h"

/* The table of a dtype that takes its ops from these two, which read and write the same forms of all that they
 * share. Without measurements all are `lower`'s. While models use the table, these stay the same. */
const gpt_ops *choice_ops(int dtype, const gpt_ops *lower, const gpt_ops *upper);

/* As gpt_cpu_measure, gpt_cpu_times and gpt_cpu_set_times, whose arguments have been checked. */
void choice_measure(int on);
int choice_times(int i, gpt_level_times *out); /* 0 past the last */
int choice_set_times(const gpt_level_times *times);

#endif
